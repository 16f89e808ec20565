"""Training: one step for every objective, one loop for every source of batches.

  objective.py        what a step minimises: weights, sums and metrics of micro-batches
  loss.py             pre-training's objective: next-token and multi-token prediction
  step.py             one optimizer step, a pure function of state, batch and knobs
  pipelined_step.py   its gradients where the layers are split into pipeline stages
  optimizer.py        AdamW
  hyperparameters.py  batch size, learning rate and loss weights as functions of the step
  batches.py          batches on the devices of a mesh
  source.py           where batches come from: `Source`, and rows of a data set as the first one
  session.py          what every run has: folder, checkpoints, metrics, signals, exit code
  loop.py             steps one after the other: log, evaluate, save
  text.py             the corpus of a run, and its rows
  pretraining.py      what pre-training adds: text, held-out score, summary, sample
  header.py           what a run says of itself before it compiles
  evaluate.py         loss and bits per byte on held-out rows
  positions.py        loss by position
  workdir.py          the folder of a run: its lock, its config, its versions
  report.py           metrics.jsonl, TensorBoard, W&B, and what the console shows of a step
  run_report.py       report.md: a run on one page
  faults.py           skipped steps and spikes of the loss
  throughput.py       tokens per second and MFU
  expert_load.py      the experts' load, kept for serving
  plots.py            the pictures of a run
  summary.py          the table at its end

Another kind of training passes its own objective, source and evaluation to the same step and loop:

    def recipe(run: Session):
        run.begin(source, abstract_state, make_state, mesh=mesh, flops_per_token=flops)
        loop.run_steps(run, step, batch_size=..., knobs=..., evaluate=...)
        if not run.exit_code:  # else a signal came, and the run has been saved
            run.finish(summary)

    session.run(config, folder, recipe, command="how to resume")
"""
