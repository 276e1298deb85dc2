"""The training loop that every stage shares: optimizers, replay, checkpoints, log.

A checkpoint is written whole or not at all, every few minutes and at the end; a run that was cut off goes
on from it. Rates warm up, stay, and fall to nothing over the stage's last part.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from embedded import Muon
from torch import nn
from torch.utils.data import DataLoader
from vision import DEVICE

SAVE_SECONDS, LOG_STEPS = 180, 20


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon trains it: matrices inside blocks, or of the projector."""
    return p.ndim == 2 and "lora" not in name and (".layers." in name or "projector" in name)


def keep(batch: list) -> list:
    """Collate nothing."""
    return batch


class Loop:
    """One stage in progress: a `train.Stage`, and what it trains.

    `task` has `net`, `stream`, `rates`, `loss` and `evaluate`.
    """

    def __init__(self, task: Any, stage: Any, state: Path, workers: int = 1) -> None:
        self.task, self.stage, self.name, self.batch = task, stage, stage.name, stage.batch
        self.workers = workers
        self.fresh = max(1, round(stage.batch * stage.fresh))
        self.file, self.log = state / f"{self.name}.pt", state / "log.jsonl"
        self.rng = random.Random(self.name)
        self.step, self.spent = 0, 0.0
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for key, p in task.net.named_parameters():
            part = max((k for k in task.rates() if key.startswith(k)), key=len)
            if p.requires_grad and task.rates()[part] > 0:
                groups.setdefault((is_matrix(key, p), task.rates()[part] * stage.rate), []).append(p)
            else:
                p.requires_grad_(False)
        muon = [{"params": p, "lr": r} for (m, r), p in groups.items() if m]
        adam = [{"params": p, "lr": r / 10} for (m, r), p in groups.items() if not m]
        self.optimizers = [Muon(muon), torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0)]
        for o in self.optimizers:
            for g in o.param_groups:
                g["peak"] = g["lr"]
        if self.file.exists():
            self.load()

    @staticmethod
    def finished(state: Path, name: str) -> bool:
        """Whether a stage came to its end."""
        file = state / f"{name}.pt"
        return file.exists() and torch.load(file, map_location="cpu", weights_only=True)["over"]

    def load(self) -> None:
        """Go on from the checkpoint."""
        saved = torch.load(self.file, map_location="cpu", weights_only=True)
        self.task.net.load_state_dict(saved["net"], strict=False)
        for o, s in zip(self.optimizers, saved["optimizers"], strict=True):
            peaks = [g["peak"] for g in o.param_groups]
            o.load_state_dict(s)
            for g, peak in zip(o.param_groups, peaks, strict=True):
                g["peak"] = peak
        self.step, self.spent = saved["step"], saved["spent"]

    def save(self) -> None:
        """Write the checkpoint: every trained parameter, the optimizers, where we are."""
        trained = {k for k, p in self.task.net.named_parameters() if p.requires_grad}
        net = {k: v for k, v in self.task.net.state_dict().items() if k in trained}
        content = {
            "net": net,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "spent": self.spent,
            "over": self.done() == 1,
        }
        new = self.file.with_suffix(".new")
        torch.save(content, new)
        new.replace(self.file)

    def write(self, row: dict) -> None:
        """One line of the log."""
        row = {"stage": self.name, "step": self.step, "at": time.strftime("%H:%M:%S", time.gmtime()), **row}
        with self.log.open("a") as f:
            f.write(json.dumps(row) + "\n")

    def rate(self) -> float:
        """The share of the peak rate."""
        return min(1.0, (self.step + 1) / 100, 0.02 + 0.98 * (1 - self.done()) / self.stage.fall)

    def done(self) -> float:
        """The share of the stage that is done, 1 at its end."""
        spent = self.spent / self.stage.seconds if self.stage.seconds else 0.0
        return min(1.0, max(self.step / self.stage.steps, spent))

    def run(self) -> None:
        """Train to the end of the stage."""
        self.task.stream.first += self.step * self.fresh
        loader = iter(
            DataLoader(self.task.stream, self.fresh, num_workers=self.workers, collate_fn=keep, prefetch_factor=4)
        )
        seen: list = []
        began = last = time.time()
        before, pictures = self.spent, 0
        while self.done() < 1:
            new = next(loader)
            batch = new + self.rng.sample(seen, min(len(seen), self.batch - len(new)))
            for s in new:
                if len(seen) < 800:
                    seen.append(s)
                else:
                    seen[self.rng.randrange(len(seen))] = s
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss, shown = self.task.loss(batch, self.step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_([p for p in self.task.net.parameters() if p.requires_grad], 1.0)
            share = self.rate()
            for o in self.optimizers:
                for g in o.param_groups:
                    g["lr"] = g["peak"] * share
                o.step()
                o.zero_grad(set_to_none=True)
            self.step += 1
            pictures += len(batch)
            now = time.time()
            self.spent, began = self.spent + now - began, now
            if self.step % LOG_STEPS == 0:
                row = {k: round(v.item(), 4) for k, v in {"loss": loss, **shown, "norm": norm}.items()}
                speed = pictures / (self.spent - before)
                self.write({**row, "rate": round(share, 3), "pictures_a_second": round(speed, 2)})
                before, pictures = self.spent, 0
            each, over = self.stage.evaluate, self.done() == 1
            if each and (over or self.step % each == 0):
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    self.write({"held_out": self.task.evaluate(self.batch)})
                began = time.time()
            if over or time.time() - last > SAVE_SECONDS:
                self.save()
                last = time.time()
        del loader
