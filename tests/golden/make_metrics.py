"""Make `golden/metrics.json`: scores by the E2E challenge's own programs.

    python -m tests.golden.make_metrics E2E_METRICS

E2E_METRICS is a checkout of github.com/tuetschek/e2e-metrics (1b9c4d8, with its two .jar
files; Java; Python's `future`). The texts are ours; they hold what tokenizers and metrics
differ in: prices, clitics, compounds, several and single references, stems, repetition.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = [
    ["The Heron is a cheap pub near the old mill.", "The Heron is a low-priced pub close to the old mill.", "Near the old mill there's a cheap pub called The Heron."],
    ["Prices at Blue Quay start at £20.", "Blue Quay charges more than £20, and children aren't welcome.", "At Blue Quay you can't eat for less than £20."],
    ["Marlow's serves Italian food, and it is child-friendly.", "Marlow's is a child friendly Italian restaurant.", "Families will like Marlow's, which serves Italian dishes.", "Marlow's: Italian, child-friendly, rated 4.5 of 5.", "It's Italian and it's child-friendly."],
    ["the the the the of the", "Somebody recommended the garden of the inn by the river."],
    ["Rated 3 out of 5, the cafe serving noodles costs £20-25.", "The cafes serve noodles for £20-25 and were rated 3 out of 5."],
    ["Wholly unrelated words here", "A riverside inn with average ratings."],
    ["Do not miss the \"Golden Pear\" (city centre), a coffee shop!", "The \"Golden Pear\" is a coffee shop in the city centre; do not miss it!", "A coffee shop in the centre of the city: the Golden Pear."],
    ["It is a pub, it is cheap, it is a pub near the river.", "It is a cheap pub and it is near the river.", "Near the river it is a pub that is cheap."],
    ["BISTRO NORD OFFERS FRENCH CHEESES.", "Bistro Nord offers French cheese", "Bistro Nord's offering is a French cheese."],
    ["A moderately priced Indian restaurant", "A moderately priced Indian restaurant"],
    ["There is no dress code at Vine & Sons, say its owners.", "Vine & Sons has no dress code, its owner says.", "The owners of Vine & Sons say that it hasn't a dress code."],
]  # fmt: skip
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


def official(checkout: Path) -> dict[str, float]:
    """Return what `measure_scores.py -p` prints."""
    with tempfile.TemporaryDirectory() as folder:
        said, true = Path(folder, "said.txt"), Path(folder, "true.txt")
        said.write_text("".join(f"{example[0]}\n" for example in EXAMPLES))
        true.write_text("\n\n".join("\n".join(e[1:]) for e in EXAMPLES) + "\n")
        command = [
            sys.executable,
            "measure_scores.py",
            "-p",
            "-t",
            str(true),
            str(said),
        ]
        done = subprocess.run(
            command, cwd=checkout, capture_output=True, text=True, check=True
        )
    scores = done.stdout.splitlines()[-1].split("\t")[1:]
    return dict(zip(METRICS, map(float, scores), strict=True))


def main() -> None:
    """Score with the whole METEOR, and with its exact and stemmed matches."""
    checkout = Path(sys.argv[1]).resolve()
    wrapper = checkout / "pycocoevalcap/meteor/meteor.py"
    whole = wrapper.read_text()
    scores = official(checkout)
    try:
        wrapper.write_text(whole.replace("'-norm']", "'-norm', '-m', 'exact stem']"))
        scores["METEOR exact stem"] = official(checkout)["METEOR"]
    finally:
        wrapper.write_text(whole)
    found = {
        "made_by": "tuetschek/e2e-metrics 1b9c4d8, measure_scores.py -p, METEOR 1.5",
        "scores": scores,
        "examples": EXAMPLES,
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    Path(__file__).with_name("metrics.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
