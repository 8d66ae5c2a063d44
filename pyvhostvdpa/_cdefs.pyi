# SPDX-License-Identifier: MIT
# cffi objects carry no static types; the modules that use them do.
from typing import Any

ffi: Any
lib: Any
