"""python -m flawmap"""

from flawmap.cli import main

main()
