"""Is a response right? One function per kind of answer; used by the collection filter and by evaluation."""


def final_answer(text):
    """What follows the last '####' (the GSM8K convention),
    without spaces around it or a trailing period; None if absent.
    """
    head, mark, tail = text.rpartition("####")
    return tail.strip().rstrip(".").strip() if mark else None


def is_correct(problem, text, allow_code=False):
    """problem: dict with `answer`; text: the response up to its first EOS -> bool.
    Exact match of the final answer.
    """
    return final_answer(text) == str(problem["answer"]).strip()
