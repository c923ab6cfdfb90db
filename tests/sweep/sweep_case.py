"""What the tests of sweeps share: a function that fills a run folder in no time, and specs for it."""

import time

from himoe.files import write_json
from himoe.run_folder import Log, read_log

FILL = "sweep_case:fill"
FEW = {"recipe": "lm_tiny", "set": {"train.steps": 8}, "axes": {"moe.preset": ["hi_moe", "switch"], "seed": [0, 1]}}
MANY = {"recipe": "lm_tiny", "set": {"train.steps": 8}, "axes": {"moe.num_experts": [8, 16], "seed": list(range(15))}}
COUNTED = {"total": 100, "active": 50, "active_without_embeddings": 40}


def fill(config, folder, prune=None):
    """Take a step each hundredth of a second, from where the log ends; the loss falls with the seed."""
    done = [line["step"] for line in read_log(folder / "metrics.jsonl")]
    write_json(folder / "env.json", {"data": {}, "parameters": COUNTED, "baselines": {}, "kernels": ["loop"]})
    log, status = Log(folder / "metrics.jsonl"), "finished"
    for step in range(max(done, default=0) + 1, config.train.steps + 1):
        time.sleep(0.01)
        loss = 5.0 - 0.1 * config.seed - step / config.train.steps
        log.append({"kind": "train", "step": step, "tokens": 64 * step, "seconds": step / 100, "loss": loss})
        if step % config.train.eval_every == 0:
            log.append({"kind": "eval", "step": step, "tokens": 64 * step, "seconds": step / 100, "loss": loss + 0.1})
            if prune is not None and prune(step, {"loss": loss + 0.1}):
                status = "pruned"
                break
    log.close()
    write_json(folder / "summary.json", {"status": status, "step": step, "tokens": 64 * step, "loss": loss})


def fail(config, folder, prune=None):
    """Fail for seed 1, always; for seed 2 at the first try; end the process for seed 3."""
    tries = folder / "tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    print(f"trying seed {config.seed}")
    if config.seed == 1 or (config.seed == 2 and tries.read_text() == "x"):
        raise ValueError(f"no luck\nwith {config.seed}")
    if config.seed == 3:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
    fill(config, folder, prune)
