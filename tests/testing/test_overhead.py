import re

from himoe.testing.overhead import main


def test_the_shares_are_printed_and_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of some text\n\n" for i in range(5000)), encoding="utf-8")
    sets = [f"data.path='{text}'", "data.held_out=0.1", "data.workers=1", "train.log_every=2"]
    assert main(["lm_tiny", "--steps", "4", *(word for pair in sets for word in ("--set", pair))]) == 0
    rows = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+)%$", capsys.readouterr().out, re.M))
    shares = {name: float(share) for name, share in rows.items()}
    parts = {"statistics", "means", "norms", "lines"}
    assert set(shares) == parts | {"together", "data wait"}
    assert all(0 < shares[part] < 100 for part in parts)
    assert abs(sum(shares[part] for part in parts) - shares["together"]) < 0.01
