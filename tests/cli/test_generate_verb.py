"""`himoe generate`: what it reads, streams, prints and refuses; the model is small and untrained."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from himoe.build import build_model
from himoe.cli import main
from himoe.config import load_config
from himoe.data.tokenizer import ByteTokenizer
from himoe.models import TextStream, generate

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_document


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose model is made here; returns its path and what `load_run` was asked for."""
    config = load_config("lm_tiny", sets=["train.threads=1"])
    made = SimpleNamespace(folder=tmp_path / "run", asked=None, config=config)
    made.folder.mkdir()
    (made.folder / "config.json").write_text("{}")
    made.model = build_model(made.config, TOKENIZER.vocab_size).eval()

    def load_run(folder, checkpoint=None, *, ema=True):
        made.asked = {"checkpoint": checkpoint, "ema": ema}
        return SimpleNamespace(
            config=made.config,
            tokenizer=TOKENIZER,
            model=made.model,
            checkpoint=Path("step-00000020"),
            weights="trained",
        )

    monkeypatch.setattr("himoe.trained.load_run", load_run)
    return made


def said(run, prompt, *, max_tokens=20, temperature=0.8, top_p=0.95, **options):
    """What the library says to one prompt."""
    tokens = generate(
        run.model,
        [[END, *prompt.encode()]],
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop={END},
        **options,
    )
    return TOKENIZER.decode(token for (token,) in tokens)


def command(run, *arguments):
    return main(["generate", str(run.folder), "--max-tokens", "20", *arguments])


def test_prompt_and_continuation_are_printed_and_the_speed_goes_to_stderr(run, capsys):
    assert command(run, "--prompt", "Once né") == 0
    out, err = capsys.readouterr()
    assert out == f"Once né{said(run, 'Once né')}\n"
    assert err.startswith("20 tokens in ") and err.endswith(" tokens/s\n")
    assert run.asked == {"checkpoint": None, "ema": True}


def test_no_prompt_is_the_start_of_a_document(run, capsys):
    assert command(run) == 0
    assert capsys.readouterr().out == f"{said(run, '')}\n"


def test_options_reach_the_sampler_and_the_checkpoint(run, capsys):
    options = ["--temperature", "1.3", "--top-k", "5", "--top-p", "0.5", "--seed", "7"]
    assert command(run, *options, "--checkpoint", "best", "--no-ema") == 0
    assert capsys.readouterr().out == f"{said(run, '', temperature=1.3, top_k=5, top_p=0.5, seed=7)}\n"
    assert run.asked == {"checkpoint": "best", "ema": False}


def test_prompts_from_options_files_and_standard_input_are_continued_together(run, capsys, monkeypatch, tmp_path):
    file = tmp_path / "start.txt"
    file.write_text("from a file\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("größer\n".encode())))
    prompts = ["--prompt", "one", "--prompt", "two", "--prompt-file", str(file), "--prompt-file", "-"]
    assert command(run, *prompts) == 0
    texts = [prompt + said(run, prompt) for prompt in ("one", "two", "from a file", "größer")]
    pages = "\n\n".join(f"── {i + 1} of 4 ──\n{text}" for i, text in enumerate(texts))
    assert capsys.readouterr().out == f"{pages}\n"


def test_json_holds_every_sample(run, capsys):
    assert command(run, "--prompt", "a", "--prompt", "b", "--num-samples", "2", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["run"], result["checkpoint"], result["weights"]) == (str(run.folder), "step-00000020", "trained")
    assert [(s["prompt"], s["sample"], s["tokens"], s["ended"]) for s in result["samples"]] == [
        ("a", 0, 20, False), ("a", 1, 20, False), ("b", 0, 20, False), ("b", 1, 20, False),
    ]  # fmt: skip
    assert result["samples"][0]["text"] == said(run, "a") != result["samples"][1]["text"]
    assert result["tokens"] == 80 and result["tokens_per_second"] == pytest.approx(80 / result["seconds"])
    assert "tokens/s" in err


def test_a_document_that_ends_is_shorter_and_the_end_is_not_printed(run, capsys):
    class Ends(torch.nn.Module):
        """In place of the head: `h`, `i`, end of document, by the number of positions read."""

        read = 0

        def forward(self, x):
            self.read += x.shape[1]
            next_token = {2: ord("h"), 3: ord("i")}.get(self.read, END)
            return torch.nn.functional.one_hot(torch.tensor(next_token), END + 1).expand(*x.shape[:2], -1) * 100.0

    run.model.head = Ends()
    assert command(run, "--prompt", "x", "--json") == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert (sample["text"], sample["tokens"], sample["ended"]) == ("hi", 3, True)


def test_text_streams_to_the_terminal_without_its_control_characters(run, monkeypatch):
    class Terminal(io.StringIO):
        flushed: list[str] = []

        def isatty(self):
            return True

        def flush(self):
            self.flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert command(run, "--prompt", "\x1b[2Jx\n\ty") == 0
    assert terminal.getvalue().startswith("\N{REPLACEMENT CHARACTER}[2Jx\n\ty") and "\x1b" not in terminal.getvalue()
    assert len(set(terminal.flushed)) > 8  # it grew in pieces


@pytest.mark.parametrize("text", ["né", "日本語 🙂", "a\N{REPLACEMENT CHARACTER}b", "e\u0301"])
def test_a_stream_gives_whole_characters_and_in_the_end_everything(text):
    stream = TextStream(TOKENIZER.decode)
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.end() == text
    assert len([piece for piece in pieces if piece]) >= len(text) - 1


def test_bytes_that_are_no_character_come_out_as_the_tokenizer_writes_them():
    ids = [0xFF, 0xC3, 0x61, 0xE6, 0x97, 0x62, 0xC3]
    stream = TextStream(TOKENIZER.decode, before=[0x78, 0x79])
    assert "".join(map(stream.add, ids)) + stream.end() == TOKENIZER.decode(ids)


def test_beyond_the_training_length_it_says_so(run, capsys):
    arguments = ["generate", str(run.folder), "--prompt", "four", "--max-tokens"]
    assert main([*arguments, "60"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*arguments, "61"]) == 0
    assert "himoe: warning: prompt and --max-tokens make up to 65 tokens, training saw 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature = -1.0 must be ≥ 0 and finite"),
        (["--top-p", "2"], "top_p = 2.0 must be above 0 and at most 1"),
        (["--max-tokens", "0"], "max_new_tokens = 0 must be ≥ 1"),
        (["--num-samples", "0"], "--num-samples is 0; it must be at least 1"),
        (["--prompt-file", "missing.txt"], "No such file or directory: missing.txt"),
        (["--prompt", "half \udce9"], "not valid Unicode at character 5"),
        (["--sead", "1"], "unknown option '--sead'; did you mean '--seed'?"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert command(run, *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_a_file_that_is_no_text_and_a_folder_that_is_no_run(run, capsys, tmp_path):
    (tmp_path / "binary").write_bytes(b"ab\xff")
    assert command(run, "--prompt-file", str(tmp_path / "binary")) == 2
    assert "binary is not UTF-8 text: byte 2" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
