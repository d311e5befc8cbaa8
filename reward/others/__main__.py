"""The rewards of others on the command line; see `reward.others.self_check`."""

from reward.arguments import main_guard
from reward.others.self_check import main

if __name__ == "__main__":
    main_guard(main)
