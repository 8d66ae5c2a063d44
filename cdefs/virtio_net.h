/* SPDX-License-Identifier: MIT */
/*
 * virtio-net, virtio 1.3 section 5.1. Multi-byte fields are little-endian.
 */

/* in front of every frame once VIRTIO_F_VERSION_1 is negotiated */
struct virtio_net_hdr_v1 {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
	uint16_t num_buffers;
};
