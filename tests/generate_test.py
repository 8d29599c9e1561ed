"""nsa-generate, as a person uses it: in processes of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import tiny_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "run"
    tiny_run.write_run(folder, steps=(2,), model__scan_layers=True)
    return folder


def run(*arguments, stdout=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, "-m", "nsa_jax.generate", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


def test_the_same_command_writes_the_same_text(workdir, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("né ".encode())
    before = sorted(workdir.rglob("*"))
    settings = ("--length=12", "--seed=3", "--top_k=40", "--top_p=0.9", "--temperature=1.5")
    first = run(f"--workdir={workdir}", "--prompt=né ", *settings)
    assert first.returncode == 0, first.stderr
    assert first.stderr == b""
    text = first.stdout.decode()
    assert text.startswith("né ")
    assert 1 <= len(text.removeprefix("né ").removesuffix("\n")) <= 12
    again = run(f"--workdir={workdir}", f"--prompt_file={tmp_path / 'prompt.txt'}", *settings)
    assert again.stdout == first.stdout
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--prompt=a",), 2, "--workdir is missing"),
        (("--workdir=WORKDIR",), 2, "one of --prompt and --prompt_file"),
        (("--workdir=WORKDIR", "--prompt_file=absent"), 2, "--prompt_file=absent: No such file"),
        (("--workdir=WORKDIR", "--prompt=a", "word"), 2, "what is 'word'?"),
        (("--workdir=WORKDIR", "--prompt=a", "--top_p=0"), 2, "--top_p=0.0 must be above 0"),
        (("--workdir=WORKDIR", "--prompt=a", "--stop="), 2, "--stop must not be empty"),
        (
            ("--workdir=WORKDIR", "--prompt=" + 30 * "a", "--length=9", "--cache=39"),
            2,
            "the prompt of 30 bytes and --length=9 do not fit into a cache of 39 tokens",
        ),
        (("--workdir=tests", "--prompt=a"), 1, "tests holds no run"),
    ],
)
def test_mistakes_end_in_one_sentence(workdir, arguments, status, expected):
    done = run(*(argument.replace("WORKDIR", str(workdir)) for argument in arguments))
    said = done.stderr.decode()
    assert done.returncode == status
    assert said.startswith("nsa-generate: ")
    assert expected in said
    assert "Traceback" not in said
    assert done.stdout == b""


def test_where_nothing_can_be_written(workdir):
    arguments = (f"--workdir={workdir}", "--prompt=a", "--length=0")
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"nsa-generate: the text cannot be written: No space left on device\n"
    nobody_reads, pipe = os.pipe()
    os.close(nobody_reads)
    done = run(*arguments, stdout=pipe)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_a_model_of_no_text_is_refused(tmp_path):
    tiny_run.write_run(tmp_path, steps=(2,), data__name="copy")
    done = run(f"--workdir={tmp_path}", "--prompt=a", "--length=3")
    assert done.returncode == 1
    assert b"data.name='copy', which is no text" in done.stderr
