"""`python -m tito`: the same as the installed command `tito`."""

from tito.main import main

if __name__ == "__main__":
    main()
