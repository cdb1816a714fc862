"""The shell game that the tiny model knows:

    ball under red . swap blue red . swap ... . where does it go ?
    now under blue . ball at gold . ... #### blue gold ...

A step follows from the one before, so that nothing can be read off far ahead; and it has several phrasings, of which
tokens that are revealed together may mix two.
"""
import numpy as np

CUPS = "red blue green gold pink gray".split()
PHRASES = ["now under {r} .", "then in {r} .", "ball at {r} ."]  # four tokens, like a swap in the prompt
STEP, RESULT = 4, 2  # tokens of a step, and where in it the result stands
N_SWAPS = 9
MOVE_SHARE = 0.65  # of the swaps move the ball
SEEDS = {"train": 1, "dev": 2, "test": 3}
HELD_OUT = 4096  # problems each of dev and test that no other split has
DRILL_SHARE, PRIVILEGED_SHARE = 0.35, 0.15  # of the base's training examples


def solution(visited, rng):
    """visited: the ball's cup after every swap -> 'now under blue . ball at gold . #### blue gold'."""
    steps = [PHRASES[rng.integers(len(PHRASES))].format(r=cup) for cup in visited]
    return " ".join([*steps, "####", *visited])  # all the cups: one guess must not be enough


def game(split, index):
    """Game `index` of a split -> (prompt, visited as in solution(), the rng that phrases solutions)."""
    rng = np.random.default_rng([SEEDS[split], index])
    ball = start = CUPS[rng.integers(len(CUPS))]
    told, visited = "", []
    for _ in range(N_SWAPS):
        others = [cup for cup in rng.permutation(CUPS).tolist() if cup != ball]
        pair = [ball, others[0]] if rng.random() < MOVE_SHARE else others[:2]
        ball = others[0] if ball in pair else ball
        x, y = pair if rng.random() < 0.5 else pair[::-1]
        told += f"swap {x} {y} . "
        visited.append(ball)
    return f"ball under {start} . {told}where does it go ?", visited, rng


def problem(split, index):
    prompt, visited, rng = game(split, index)
    return dict(prompt=prompt, solution=solution(visited, rng), answer=" ".join(visited))


def example(index, n_drill=None):
    """What a model learns from -> (prompt, solution to show with it or "", response, which of its 48 tokens are masked
    or None: any). n_drill, for the base: the first ones, then a share, are drills, which mask only results."""
    prompt, visited, rng = game("train", index)
    drill, shown = n_drill and (index < n_drill or rng.random() < DRILL_SHARE), ""
    if not drill and rng.random() < PRIVILEGED_SHARE:
        shown = solution(visited, rng)
    response, masked = solution(visited, rng), None
    if drill:
        at = np.arange(48)
        results = (at % STEP == RESULT) & (rng.random(48) < rng.random())
        answer = (at > STEP * N_SWAPS) & (at <= (STEP + 1) * N_SWAPS)  # it repeats the results
        masked = np.where(at < STEP * N_SWAPS, results, answer).tolist()
    return prompt, shown, response, masked
