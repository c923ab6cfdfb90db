"""What `himoe prepare` prints of a corpus."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from himoe.data.preparation.progress import format_bytes

SAMPLE_LINES = 4  # of each sample
OUT = {  # what lies in a folder that is to be written
    "made": "holds this corpus already",
    "begun": "holds a part of this corpus, to be gone on with",
    "free": "to be written",
    "unread": "holds a corpus with these settings; refused if, once read, its text turns out to be another",
}


def print_plan(console: Console, planned: dict[str, Any]) -> None:
    """Print what a preparation would do."""
    if "bytes" not in planned:
        print_facts(console, {"prepared": f"{planned['prepared']}, opened as it is"})
        return
    kind = planned["tokenizer"]
    read = f"{format_bytes(planned['bytes'])} in {planned['parts']:,} part{'s' * (planned['parts'] != 1)}"
    facts = {
        "text": f"{planned['text']}, {read}",
        "first": planned["first"],
        "tokenizer": f"bpe, {planned['vocab_size']:,} entries, to be learned" if kind == "bpe" else kind,
        "held out": f"{planned['held_out']:.4g} of the documents",
        "duplicates": "removed" if planned["deduplicate"] else "kept",
        "prepared": None if planned["out"] else planned["prepared"] or "not yet",
        "out": planned["out"] and f"{planned['out']}, {OUT[planned['state']]}",
    }
    print_facts(console, facts)


def print_corpus(console: Console, found: dict[str, Any]) -> None:
    """Print what `inspect_corpus` found."""
    _print_domains(console, found["domains"])
    settings, tokenizer, shards = found["settings"], found["tokenizer"], found["shards"]
    facts = {
        "tokenizer": f"{tokenizer['name']}, {tokenizer['vocab_size']:,} entries"
        + ("" if tokenizer["exact"] else "; does not give every text back as it was"),
        "shards": f"{shards['number']:,} files, {format_bytes(shards['bytes'])}"
        + (", every byte as written" if found["verified"] else ""),
        "folder": found["folder"],
    }
    samples = {name: part["samples"] for name, part in found["domains"].items() if "samples" in part}
    if samples:
        facts |= {
            "held out": f"{settings['held_out']:.4g} of the documents"
            + (f", at least {format_bytes(least)} a domain" if (least := settings["minimum_held_out"]) > 1 else ""),
            "duplicates": "removed" if settings["deduplicate"] else "kept",
            "hash": found["hash"],
        }
    facts["train on it"] = found["train"]
    print_facts(console, facts)
    for name, texts in samples.items():
        for text in texts:
            console.print(f"\n[bold]{escape(name)}[/bold]")
            for line in text.splitlines()[:SAMPLE_LINES]:
                console.print(f"  {line}", highlight=False, markup=False, no_wrap=True, overflow="ellipsis")


def _print_domains(console: Console, domains: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("domain", overflow="ellipsis", no_wrap=True)
    removed = any(part["duplicates"]["documents"] for part in domains.values())
    for column in ("documents", "text", "tokens", "bytes/token", "held out", *["duplicates"] * removed):
        table.add_column(column, justify="right", no_wrap=True)
    for name, part in domains.items():
        train, held_out = part["train"], part["held_out"]
        size = train["bytes"] + held_out["bytes"]
        table.add_row(
            escape(name),
            f"{train['documents'] + held_out['documents']:,}",
            format_bytes(size),
            f"{train['tokens'] + held_out['tokens']:,}",
            f"{part['bytes_per_token']:.2f}",
            f"{100 * held_out['bytes'] / max(1, size):.1f} %",
            *[f"{part['duplicates']['documents']:,}"] * removed,
        )
    console.print(table, highlight=False)
    console.print()


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """Print names and facts, a line each; those that are None are left out."""
    for name, fact in facts.items():
        if fact is not None:
            console.print(f"{name.replace('_', ' '):<12} {fact}", highlight=False, markup=False, soft_wrap=True)
