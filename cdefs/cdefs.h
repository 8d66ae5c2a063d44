/* SPDX-License-Identifier: MIT */
/* Everything build.py tells cffi, in the order it tells it. */
#ifndef CDEFS_H
#define CDEFS_H

#include <stdint.h>

#include "vhost_types.h"
#include "vhost.h"
#include "virtio_ring.h"
#include "virtio_net.h"
#include "ring.h"
#include "memory.h"
#include "svq.h"
#include "ctrl.h"
#include "nic.h"
#include "pages.h"
#include "bench.h"
#include "calls.h"

#endif
