/* SPDX-License-Identifier: MIT */
/*
 * Structures of linux/vhost_types.h that reach vhost-vdpa, declared here so
 * that a build never depends on the age of the build host's headers.
 * tests/unit/test_uapi.py compares sizes and offsets with linux-libc-dev.
 */

struct vhost_vring_state {
	uint32_t index;
	uint32_t num;
};

struct vhost_vring_file {
	uint32_t index;
	int32_t fd;		/* -1 unbinds */
};

/* used comes before avail: the order of the kernel's structure */
struct vhost_vring_addr {
	uint32_t index;
	uint32_t flags;
	uint64_t desc_user_addr;
	uint64_t used_user_addr;
	uint64_t avail_user_addr;
	uint64_t log_guest_addr;
};

struct vhost_vdpa_iova_range {
	uint64_t first;
	uint64_t last;
};

struct vhost_iotlb_msg {
	uint64_t iova;
	uint64_t size;
	uint64_t uaddr;
	uint8_t perm;
	uint8_t type;
	uint8_t padding[6];
};

/*
 * The kernel's structure ends in a union padded to 64 bytes; success of a
 * write() is always reported as these 72 bytes
 * (drivers/vhost/vhost.c:vhost_chr_write_iter).
 */
struct vhost_msg_v2 {
	uint32_t type;
	uint32_t asid;
	struct vhost_iotlb_msg iotlb;
	uint8_t reserved[32];
};
