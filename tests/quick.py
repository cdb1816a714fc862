"""What would take every process of the tests long, again and again."""
import gc
import inspect
import os
import sys


def sources_are_read_once(inner=inspect.getsource, read={}):
    """inspect.getsource() parses a class's file anew, for the help of every command line."""
    def getsource(thing):
        file = getattr(sys.modules.get(getattr(thing, "__module__", "")), "__file__", None)
        if not isinstance(thing, type) or not file:
            return inner(thing)
        key = os.path.abspath(file), thing.__qualname__
        if key not in read:
            read[key] = inner(thing)
        return read[key]
    inspect.getsource = getsource


def what_is_there_stays():
    """gc.collect() then looks only at what comes later: the modules alone take it a quarter of a second."""
    gc.collect()
    gc.freeze()
