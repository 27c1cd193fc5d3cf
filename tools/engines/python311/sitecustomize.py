"""What Megatron-LM from 0.19 on imports of Python 3.12, for the tests on Python 3.11.

Python imports this module when it starts, because its folder is on the path.
"""

import typing

if not hasattr(typing, "override"):
    import typing_extensions

    vars(typing)["override"] = typing_extensions.override
