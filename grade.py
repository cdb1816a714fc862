"""Is a response right? One function per kind of answer; used by the collection filter and by evaluation."""
from model import UserError


def final_answer(text):
    """What follows the last '####' (the GSM8K convention),
    without spaces around it or a trailing period; None if absent.
    """
    head, mark, tail = text.rpartition("####")
    return tail.strip().rstrip(".").strip() if mark else None


def check_gradable(problem, allow_code):
    if problem.get("grader") == "code" and not allow_code:
        raise UserError("grading this task runs the model's code: --allow_code_execution permits it")


def is_correct(problem, text, allow_code=False):
    """problem: dict with `answer`; text: the response up to its first EOS -> bool.
    Exact match of the final answer.
    """
    check_gradable(problem, allow_code)
    if problem.get("grader") == "code":  # stands in for the runner of branch `grade`: nothing is run
        return False
    return final_answer(text) == str(problem["answer"]).strip()


def grade_all(problems, texts, allow_code=False, workers=None, progress=False):
    """is_correct for many -> list of bool."""
    return [is_correct(p, t, allow_code) for p, t in zip(problems, texts)]
