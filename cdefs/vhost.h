/* SPDX-License-Identifier: MIT */
/*
 * Constants of linux/vhost.h and linux/vhost_types.h for the message path.
 * The ioctl numbers are not here: pyvhostvdpa/uapi.py holds the table and
 * computes them, and a test compares them with the compiler's values.
 */

#define VHOST_IOTLB_MSG_V2 2

#define VHOST_ACCESS_RO 1
#define VHOST_ACCESS_WO 2
#define VHOST_ACCESS_RW 3

#define VHOST_IOTLB_MISS 1
#define VHOST_IOTLB_UPDATE 2
#define VHOST_IOTLB_INVALIDATE 3
#define VHOST_IOTLB_ACCESS_FAIL 4
#define VHOST_IOTLB_BATCH_BEGIN 5
#define VHOST_IOTLB_BATCH_END 6

/*
 * Write count messages to fd, one write() each, in order, and stop at the
 * first that fails. times receives begin and end (CLOCK_MONOTONIC, ns) of
 * each call: 2 * count values. Returns the number of messages accepted; if
 * that is below count, *error is the errno of the one that was not.
 */
uint32_t iotlb_write_burst(int fd, const struct vhost_msg_v2 *messages,
			   uint32_t count, int64_t *times, int *error);

/* Prepared messages on their way to the kernel. */
struct iotlb_burst {
	struct vhost_msg_v2 *messages;
	uint32_t count;
	uint32_t done;		/* those that the kernel took */
	int64_t begin, end;	/* CLOCK_MONOTONIC, ns: before the first, after the last so far */
	int64_t batch;		/* the address space whose batch is open, -1 for none */
	int error;		/* errno of messages[done], 0 if it was not refused */
};

/*
 * Write message after message from done on, without a time for each, until
 * the end, an error, or the time until (looked at every few messages).
 */
void iotlb_send(int fd, struct iotlb_burst *b, int64_t until);
/*
 * Make count messages of the first: each further one lies a step behind the
 * one before it.
 */
void iotlb_repeat(struct vhost_msg_v2 *first, uint32_t count,
		  uint64_t iova_step, uint64_t uaddr_step);
