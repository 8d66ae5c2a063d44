/* SPDX-License-Identifier: MIT */
/*
 * Guest memory on its way to another process: what was written, how it is
 * framed, and that it arrived as it left. Plain declarations, as in vring.h.
 */

/*
 * The checksum of every frame on a migration's stream. It finds corruption,
 * not forgery: TLS is for that.
 */
uint64_t stream_sum(const uint8_t *bytes, uint64_t length);
