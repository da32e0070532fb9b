"""Several processes on this machine as one job: started together, and ended together.

    gang.py     starts the ranks, watches them, stops the rest at the first failure
    verdict.py  which rank failed first, why, and with which code to exit
    output.py   what the ranks print: log files, the foreground, noise left out
    keeper.py   a process that ends the ranks if the supervisor itself is killed
"""

from .gang import Plan as Plan
from .gang import run as run
