# SPDX-License-Identifier: MIT
"""How a device is started, stopped and switched: which calls, in which order.

:mod:`~pyvhostvdpa.device.procedure.direct` is this package's own way.
"""
