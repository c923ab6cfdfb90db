"""What the tests of sweeps share: a function that fills a run folder in no time, and specs for it."""

import math
import time

from himoe.files import write_json
from himoe.run_folder import Log, read_json, read_log

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


LOSS_OF = {"hi_moe": 3.0, "switch": 3.1, "moge": 3.0, None: 3.3}


def by_strategy(config, folder, prune=None):
    """Give each preset a loss, best at the learning rate 0.012, which the seed moves more than the preset does."""
    moe = bool(config.moe_layer_indices)
    preset = config.moe.preset if moe else None
    if preset == "switch" and config.seed == 3:
        raise ValueError("no third one")
    wobble = {"hi_moe": 0.0, "moge": 0.004 * (-1) ** config.seed}.get(preset, 0.003 * (config.seed % 3))
    loss = LOSS_OF[preset] + 0.2 * config.seed + wobble + 0.1 * abs(math.log2(config.train.learning_rate / 0.012))
    write_json(folder / "env.json", {"data": {}, "parameters": COUNTED, "baselines": {}, "kernels": ["loop"]})
    log = Log(folder / "metrics.jsonl")
    log.append({"kind": "train", "step": 8, "tokens": 512, "seconds": 2.0, "loss": loss, "tokens_per_second": 256.0})
    log.append({"kind": "eval", "step": 8, "tokens": 512, "seconds": 2.0, "loss": loss})
    log.close()
    domains = {"prose": {"bits_per_byte": loss / 2}, "<code>": {"bits_per_byte": loss / 3}}
    layers = [{"layer": 0, "cv_window": 0.2, "max_vio_window": 0.5, "dead_experts": [1]}] if moe else []
    write_json(folder / "summary.json", {
        "status": "finished", "step": 8, "tokens": 512, "loss": loss, "bits_per_byte": loss / 2.5, "seconds": 2.0,
        "tokens_per_second": 256.0, "domains": domains, "layers": layers,
    })  # fmt: skip


def fails_at_the_best_rate(config, folder, prune=None):
    """As by_strategy, but moge diverges at the rate of 0.012."""
    if config.moe.preset == "moge" and config.train.learning_rate == 0.012:
        raise ValueError("diverged")
    by_strategy(config, folder, prune)


def some_fail(config, folder, prune=None):
    """Finish seed 1 of hi_moe alone, seed 2 of moge alone, no switch, and every dense run."""
    works = {"hi_moe": (1,), "moge": (2,), "switch": ()}.get(
        config.moe.preset if config.moe_layer_indices else "", (1, 2)
    )
    if config.seed not in works:
        raise ValueError("not this one")
    by_strategy(config, folder, prune)


def one_is_short(config, folder, prune=None):
    """As by_strategy, but seed 2 of moge ends at half of its tokens."""
    by_strategy(config, folder, prune)
    if config.moe.preset == "moge" and config.seed == 2:
        write_json(folder / "summary.json", {**read_json(folder / "summary.json"), "tokens": 256})


def none_works(config, folder, prune=None):
    """Fail always."""
    raise ValueError("none works")


def fails_at_a_low_rate(config, folder, prune=None):
    """As by_strategy, but all fail at the rate of 0.003, and say each time that they were tried."""
    if config.train.learning_rate == 0.003:
        with (folder / "tries").open("a") as file:
            file.write("x")
        raise ValueError("too low")
    by_strategy(config, folder, prune)
