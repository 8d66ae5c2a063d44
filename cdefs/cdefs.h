/* SPDX-License-Identifier: MIT */
/* All declarations that build.py passes to cffi, in that order. */
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
#include "handover.h"
#include "lost_memory.h"
#include "guest_rest.h"
#include "trial.h"

#endif
