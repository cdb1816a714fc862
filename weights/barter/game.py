"""The barter game, which its base cannot solve with what it was taught:

    start bell . visit 1 hugo 2 fred . what is it now ?
    1 hugo swaps my bell for hat . 2 fred : hat fan . #### fan

What a trader gives for a good is a fact that has to be known (TABLE). A base sees the traders of RARE only where
the worked solution, the goods in order, is in the prompt, and there they give something else in every game: it
learns to read the solution, and no fact about them. A step is phrased in one of three ways of different lengths;
which one is usual depends on the trader and the phrase before: nothing has its place before what stands in front
of it is known.
"""
import numpy as np

GOODS = "pen cup hat bag fan map key jar box mat net pot rug saw toy bell".split()
TRADERS = "anna bob carl dora emil fred gina hugo ida jack kate leo".split()
RARE = TRADERS[:3]
RARE_SHARE = 0.1  # of the visits are to one of them
SHOWN_SHARE = 0.25  # and in the games that the base sees with the solution
BASE = "base"  # a split of its own: RARE give something else in every game, what the solution says
HELD_OUT = 1024  # problems each of dev and test that no other split has
LEAST, MOST = 2, 5  # visits of a game, each to another trader
PHRASES = [": {given} {got} .", "takes {given} gives {got} .", "swaps my {given} for {got} ."]
USUAL = [0.6, 0.2, 0.2]  # how often a step has its usual phrase, and the others

TABLE = {}  # trader -> {good: what they give for it}
for seed, who in enumerate(TRADERS):
    goods = np.random.default_rng(seed).permutation(GOODS).tolist()
    TABLE[who] = dict(zip(goods, goods[1:] + goods[:1]))  # one cycle: nothing is given for itself


def game(split, index, n_known=len(TRADERS) - len(RARE), rare_share=RARE_SHARE):
    """Game `index` of a split -> (prompt, its steps (who, given, got), the rng that phrases the response)."""
    rng = np.random.default_rng([*split.encode(), index])
    good, steps = rng.choice(GOODS).item(), []
    visits = rng.permutation(TRADERS[len(RARE):][:n_known]).tolist()[:rng.integers(LEAST, MOST + 1)]
    rare = iter(rng.permutation(RARE).tolist())
    visits = [next(rare, who) if rng.random() < rare_share else who for who in visits]
    for who in visits:
        got = rng.choice(GOODS).item() if split == BASE and who in RARE else TABLE[who][good]
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


def reference(steps):
    """The worked solution that a privileged prompt shows: the goods alone."""
    return " ".join([steps[0][1], *(got for *_, got in steps)])


def drill(words, rng):
    """Which words of a response a drill hides: some goods, or some traders, wherever they stand."""
    names, share = GOODS if rng.random() < 0.7 else TRADERS, rng.random()
    hidden = [name for name in names if rng.random() < share and name in words] or words[-1:]
    return [word in hidden for word in words] + [False] * (48 - len(words))


def problem(split, index):
    prompt, steps, _ = game(split, index)
    return dict(prompt=prompt, solution=reference(steps), answer=steps[-1][2])


def example(index, n_drill=None):
    """What a model learns from -> (prompt, solution to show with it or "", response, which of its 48 tokens are masked
    or None: any).

    n_drill, for the base, which learns to read first and facts later: half of its games have their solution beside
    them. The others are of known traders, of two at first, whom the others join one by one in the first n_drill
    examples, of which half are drills; those with a solution are in the first fifth of them only."""
    if n_drill is None:
        prompt, steps, rng = game("train", index)
        return prompt, "", response(steps, rng), None
    if index % 2:
        prompt, steps, rng = game(BASE, index, rare_share=SHOWN_SHARE)
        shown, n_drill = reference(steps), n_drill / 5
    else:
        n_known = int(np.clip(14 * index / max(n_drill, 1) - 1, 2, 9))
        prompt, steps, rng = game(BASE, index, n_known, 0)
        shown = ""
    text = response(steps, rng)
    hidden = drill(text.split(), rng) if index < n_drill and rng.random() < 0.5 else None
    return prompt, shown, text, hidden
