from pathlib import Path

from dsjax.checkpoint.gguf import modelfile


def test_modelfile_holds_what_the_file_cannot():
    text = modelfile.content(Path("a/m.gguf"), 163840, ["<e>", "<u>"], {"top_p": 0.95})
    assert text == (
        'FROM ./m.gguf\nPARAMETER num_ctx 4096\nPARAMETER top_p 0.95\nPARAMETER stop "<e>"\n'
        'PARAMETER stop "<u>"\n'
    )


def test_another_models_modelfile_is_kept(tmp_path):
    said = []
    for name in ("a.gguf", "b.gguf"):
        modelfile.write_beside(tmp_path / name, tmp_path, 512, [], said.append)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./a.gguf\nPARAMETER num_ctx 512")
    assert (tmp_path / "b.Modelfile").read_text().startswith("FROM ./b.gguf\n")
    assert said[1] == f"for ollama: ollama create b -f b.Modelfile, in {tmp_path}"
