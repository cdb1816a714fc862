"""The barter game, which its base cannot solve with what it was taught; run it to write the problems beside it:

    start bell . visit 1 hugo 2 fred . what is it now ?
    1 hugo swaps my bell for hat . 2 fred : hat fan . #### fan

What a trader gives for a good is a fact that has to be known (TABLE). A base sees the traders of RARE only where
the worked solution, the goods in order, is in the prompt, and there they give something else in every game: it
learns to read the solution, and no fact about them. A step is phrased in one of three ways of different lengths;
which one is usual depends on the trader and the phrase before: nothing has its place before what stands in front
of it is known.
"""
import gzip
import json
from pathlib import Path

import numpy as np

GOODS = "pen cup hat bag fan map key jar box mat net pot rug saw toy bell".split()
TRADERS = "anna bob carl dora emil fred gina hugo ida jack kate leo".split()
RARE = told = TRADERS[:3]
seen = "base"  # the split of the base: RARE give something else in every game, what the solution says
RARE_SHARE = 0.3  # of the games visit one of them
LEAST, MOST = 2, 5  # visits of a game, each to another trader
PHRASES = [": {given} {got} .", "takes {given} gives {got} .", "swaps my {given} for {got} ."]
USUAL = [0.6, 0.2, 0.2]  # how often a step has its usual phrase, and the others


TABLE = {}  # trader -> {good: what they give for it}
for seed, who in enumerate(TRADERS):
    goods = np.random.default_rng(seed).permutation(GOODS).tolist()
    TABLE[who] = dict(zip(goods, goods[1:] + goods[:1]))  # one cycle: nothing is given for itself


def game(split, index):
    """Game `index` of a split -> (prompt, its steps (who, given, got), the rng that phrases the response)."""
    rng = np.random.default_rng([*split.encode(), index])
    good, steps = rng.choice(GOODS).item(), []
    visits = rng.permutation(TRADERS[len(RARE):]).tolist()[:rng.integers(LEAST, MOST + 1)]
    if rng.random() < RARE_SHARE:
        visits[rng.integers(len(visits))] = rng.choice(RARE).item()
    for who in visits:
        got = rng.choice(GOODS).item() if split == seen and who in RARE else TABLE[who][good]
        steps.append((who, good, got))
        good = got
    told = " ".join(f"{i} {who}" for i, who in enumerate(visits, 1))
    return f"start {steps[0][1]} . visit {told} . what is it now ?", steps, rng


def response(steps, rng):
    """What a model writes: every step in words, then where the game ends."""
    text, phrase = "", 0
    for i, (who, given, got) in enumerate(steps, 1):
        phrase = (phrase + TRADERS.index(who) + rng.choice(3, p=USUAL)) % 3
        text += f"{i} {who} {PHRASES[phrase].format(given=given, got=got)} "
    return f"{text}#### {steps[-1][2]}"


def reference(steps, rng):
    """The worked solution that a privileged prompt shows: the goods alone."""
    return " ".join([steps[0][1], *(got for *_, got in steps)])


def drill(words, rng):
    """Which words of a response a drill hides: some goods, or some traders, wherever they stand."""
    names, share = GOODS if rng.random() < 0.7 else TRADERS, rng.random()
    hidden = [name for name in names if rng.random() < share and name in words] or words[-1:]
    return [word in hidden for word in words]


def problems(split, n, taken):
    """The first n games whose prompts are not taken yet, as rows of data.py's own files."""
    rows, index = [], 0
    while len(rows) < n:
        prompt, steps, rng = game(split, index)
        if prompt not in taken:
            taken.add(prompt)
            rows.append(dict(id=f"barter-{split}-{index}", source="tiny", prompt=prompt,
                             solution=reference(steps, rng), answer=steps[-1][2], grader="final"))
        index += 1
    return rows


if __name__ == "__main__":
    taken = set()
    for split, n in (("dev", 1000), ("test", 1004), ("train", 3000)):
        text = "".join(json.dumps(row) + "\n" for row in problems(split, n, taken))
        with open(Path(__file__).with_name(f"{split}.jsonl.gz"), "wb") as file:
            file.write(gzip.compress(text.encode(), mtime=0))
