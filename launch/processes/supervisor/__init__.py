"""Several processes on this machine as one job: started together, and ended together.

- gang.py starts the ranks, watches them, and stops the rest at the first failure
- verdict.py says which rank failed first, why, and with which code to exit
- output.py has what the ranks print: log files, the foreground, noise left out
- foreground.py writes to standard output and error, and never waits for who reads them
- folder.py is the folder of the log files
- restarts.py says when to start the ranks again
- environment.py makes the environment of a rank
- keeper.py ends the ranks if the supervisor itself is killed
"""

from .gang import CannotStart as CannotStart
from .gang import Gang as Gang
from .gang import run as run
