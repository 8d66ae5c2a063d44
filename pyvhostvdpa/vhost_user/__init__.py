# SPDX-License-Identifier: MIT
"""A virtual machine as the guest: a vhost-user-net back-end on top of a vhost-vdpa device.

The front-end (QEMU, DPDK's virtio-user, ...) speaks over a Unix socket; :mod:`~pyvhostvdpa.vhost_user.messages` has
its messages, :mod:`~pyvhostvdpa.vhost_user.session` their meaning, :mod:`~pyvhostvdpa.vhost_user.backend` their
effect on the device.
"""
