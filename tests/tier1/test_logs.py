"""Logs of trainings are read whoever wrote them: this trainer, transformers of any version, or a CSV."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest

from finetune.core.errors import DataError, MissingError
from finetune.testing import check_convergence, logged_steps
from finetune.testing.logs import Logged
from support.town import Ran

# As each library writes it: the first rows of its file.
CSVS: dict[str, tuple[str, list[Logged]]] = {
    "transformers": (
        "step,loss,grad_norm,learning_rate,epoch,eval_loss\n1,4.5,0.9,0.0002,0.5,\n2,4.25,0.8,0.0001,1.0,\n2,,,,1.0,4.4\n",
        [
            Logged(step=1, loss=4.5, grad_norm=0.9, learning_rate=2e-4, epoch=0.5),
            Logged(step=2, loss=4.25, grad_norm=0.8, learning_rate=1e-4, epoch=1.0),
        ],
    ),
    "TRL, of a tracker": (
        "train/global_step,train/loss,train/learning_rate\n10,2.5,1e-05\n20,2.25,5e-06\n",
        [Logged(step=10, loss=2.5, learning_rate=1e-5), Logged(step=20, loss=2.25, learning_rate=5e-6)],
    ),
    "Lightning": (
        "epoch,lr-AdamW,step,train_loss,val_loss\n,0.001,0,,\n0,,49,1.5,\n0,,49,,1.75\n1,,99,1.25,\n",
        [Logged(step=49, loss=1.5, epoch=0), Logged(step=99, loss=1.25, epoch=1)],
    ),
    "Keras": (
        "epoch,accuracy,learning_rate,loss,val_accuracy,val_loss\n0,0.5,0.001,3.5,0.4,3.75\n1,0.6,0.001,3.0,0.5,3.25\n",
        [
            Logged(step=1, loss=3.5, epoch=0, learning_rate=1e-3, eval_loss=3.75),
            Logged(step=2, loss=3.0, epoch=1, learning_rate=1e-3, eval_loss=3.25),
        ],
    ),
    "a spreadsheet": (
        '\ufeffstep, loss\r\n1," 2.0"\r\n3,1e0\r\n',
        [Logged(step=1, loss=2.0), Logged(step=3, loss=1.0)],
    ),
}


def written(tmp_path: Path, text: str, name: str = "metrics.csv") -> Path:
    file = tmp_path / name
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize("kind", CSVS)
def test_a_csv_is_read_under_the_names_that_its_trainer_gives(tmp_path: Path, kind: str) -> None:
    text, steps = CSVS[kind]
    assert logged_steps(written(tmp_path, text)) == steps


def test_there_are_as_many_csvs_as_were_counted() -> None:
    assert len(CSVS) == 5


OLD_STATE = {
    "best_metric": None,
    "epoch": 1.0,
    "global_step": 2,
    "max_steps": 2,
    "log_history": [
        {"epoch": 0.5, "learning_rate": 1e-4, "loss": 3.5, "step": 1},
        {"epoch": 1.0, "learning_rate": 0.0, "loss": 3.0, "step": 2},
        {"epoch": 1.0, "eval_loss": 3.2, "eval_runtime": 0.1, "step": 2},
        {"epoch": 1.0, "step": 2, "total_flos": 9, "train_loss": 3.25, "train_runtime": 1.0},
    ],
    "trial_name": None,
}


@pytest.mark.parametrize("alone", [False, True])
def test_transformers_older_states_are_read_and_what_is_said_of_the_whole_is_no_step(
    tmp_path: Path, alone: bool
) -> None:
    text = json.dumps(OLD_STATE["log_history"] if alone else OLD_STATE)
    assert logged_steps(written(tmp_path, text, "trainer_state.json")) == [
        Logged(step=1, loss=3.5, epoch=0.5, learning_rate=1e-4), Logged(step=2, loss=3.0, epoch=1.0, learning_rate=0.0)
    ]  # fmt: skip


def test_the_logs_of_this_trainer_are_read_of_today_and_of_0_1(honest: Ran, tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parents[1] / "support" / "run-0.1.0.tar.gz") as archive:
        stream = archive.extractfile("runs/town/train/trainer_logs.json")
        assert stream is not None
        old = written(tmp_path, stream.read().decode(), "trainer_logs.json")
    for file in (honest.run.path / "train" / "trainer_logs.json", old):
        wanted = json.loads(file.read_text())
        found = logged_steps(file)
        assert [(step.step, step.loss, step.grad_norm) for step in found] == [
            (each["step"], each["loss"], each["grad_norm"]) for each in wanted
        ]
        assert len(found) == 12
        assert check_convergence(file)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("step,loss\n1,2.0\n2,much\n", "metrics.csv:3: loss: expected a number, not 'much'"),
        ("step,train/loss\n1.5,2.0\n", "metrics.csv:2: step: expected a whole number, not '1.5'"),
        ("step,train/loss\n,2.0\n", "metrics.csv:2: step: expected a whole number, not ''"),
        ("step,loss,lr\n-1,2.0,1\n", "metrics.csv:2: step: expected a whole number, not '-1'"),
        ("step,loss,lr\n1,2.0,fast\n", "metrics.csv:2: lr: expected a number, not 'fast'"),
        ("step,accuracy\n1,2.0\n", "metrics.csv:1: no column is a loss (loss, train/loss, "),
        ("step,loss\n1\n", "metrics.csv:2: 1 value for 2 columns"),
        ("step,loss,loss\n1,2,3\n", "metrics.csv:1: column 'loss' is named twice"),
        ("", "metrics.csv:1: the file is empty"),
    ],
)
def test_a_fault_names_file_line_and_column(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(DataError) as refused:
        logged_steps(written(tmp_path, text))
    assert f"{tmp_path}/{fault}" in str(refused.value)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        logged_steps(written(tmp_path, "step,loss\nx,1\n2,y\n3,2\nz,4\n"))
    assert [fault.partition("metrics.csv:")[2][0] for fault in refused.value.faults] == ["2", "3", "5"]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([{"step": 1, "loss": "low"}], "trainer_state.json: entry 1: loss: expected a number, not 'low'"),
        (
            {"log_history": [{"step": True, "loss": 1}]},
            "trainer_state.json: entry 1: step: expected a whole number, not True",
        ),
        ([3], "trainer_state.json: entry 1: expected names and values, not 3"),
        (
            {"history": []},
            "trainer_state.json: neither a list of what was logged nor an object with one as 'log_history'",
        ),
    ],
)
def test_a_fault_in_json_names_the_entry(tmp_path: Path, value: Any, fault: str) -> None:
    with pytest.raises(DataError) as refused:
        logged_steps(written(tmp_path, json.dumps(value), "trainer_state.json"))
    assert fault in str(refused.value)


def test_what_is_no_json_and_what_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"state\.json: not JSON"):
        logged_steps(written(tmp_path, "{", "state.json"))
    with pytest.raises(MissingError, match="no file"):
        logged_steps(tmp_path / "gone.csv")


def test_a_loss_that_is_no_number_is_a_loss_all_the_same(tmp_path: Path) -> None:
    file = written(tmp_path, "step,loss\n1,4.0\n2,nan\n3,inf\n4,1.0\n")
    found = [step.loss for step in logged_steps(file)]
    assert (math.isnan(found[1]), found[2]) == (True, math.inf)
    with pytest.raises(AssertionError, match="2 of 4 losses are not finite"):
        check_convergence(file)


def test_convergence_is_judged_from_a_file_as_from_its_numbers(tmp_path: Path) -> None:
    falling = [4.0 - number / 10 for number in range(20)]
    file = written(tmp_path, "epoch,loss\n" + "".join(f"{n},{loss}\n" for n, loss in enumerate(falling)))
    assert check_convergence(file) is check_convergence(str(file)) is check_convergence(falling) is True
