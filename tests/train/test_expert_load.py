import numpy as np
import pytest

from dsjax.parallel import eplb
from dsjax.train.expert_load import FILE_NAME, ExpertLoad


def test_file_holds_the_means_since_the_last_one(tmp_path):
    load = ExpertLoad()
    load.add(np.asarray([[1.0, 0.0]], np.float32))
    load.write(tmp_path, 1)
    for share in (0.25, 0.75, 0.5):
        load.add(np.asarray([[share, 1 - share]], np.float32))
    load.write(tmp_path, 4)
    with np.load(tmp_path / FILE_NAME) as stored:
        assert stored["steps"] == 3 and stored["last_step"] == 4
    np.testing.assert_array_equal(eplb.read_load(tmp_path / FILE_NAME), [[0.5, 0.5]])
    load.write(tmp_path, 5)  # no step since
    assert eplb.read_load(tmp_path / FILE_NAME).tolist() == [[0.5, 0.5]]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_dense_model_leaves_no_file(tmp_path):
    ExpertLoad().write(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_loads_of_a_run_give_a_placement(tmp_path):
    """The expert with most load gets the replica."""
    load = ExpertLoad()
    load.add(np.asarray([[0.1, 0.2, 0.6, 0.1]]))
    load.write(tmp_path, 1)
    placement = eplb.balance(eplb.read_load(tmp_path / FILE_NAME), n_slots=6, n_devices=2)
    assert placement.count_LE.tolist() == [[1, 1, 3, 1]]


def test_another_file_is_refused(tmp_path):
    for name, arrays in (("other.npz", {"x": np.ones(3)}), ("flat.npz", {"load_LE": np.ones(3)})):
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=r"holds no expert loads.*expert_load\.npz"):
            eplb.read_load(tmp_path / name)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="holds no expert loads"):
        eplb.read_load(tmp_path / "text.npz")
