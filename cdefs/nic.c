/* SPDX-License-Identifier: MIT */
/*
 * What a guest's virtio-net driver does with one RX/TX pair, and the traffic
 * on it: numbered, checksummed frames that the device loops back.
 */
#include "gate.h"
#include "ring_access.h"

#define ETH_HEADER 14
#define ETHERTYPE_EXPERIMENTAL 0x88b5 /* IEEE 802 local experimental 1 */
#define FRAME_MAGIC 0x76445041u

struct frame_tag {
	uint32_t magic;
	uint32_t flow;
	uint64_t seq;
};

static uint64_t mix(uint64_t h, uint64_t word)
{
	h = (h ^ word) * 0x9e3779b97f4a7c15ull;
	return h ^ (h >> 29);
}

/* over everything between the virtio_net_hdr and the sum itself */
static uint64_t frame_sum(const uint8_t *p, uint32_t len)
{
	uint64_t h = len, word = 0;

	for (; len >= 8; p += 8, len -= 8) {
		memcpy(&word, p, 8);
		h = mix(h, word);
	}
	word = 0;
	memcpy(&word, p, len);
	return mix(h, word);
}

static void build_frame(struct nic_pair *p, uint8_t *buffer, uint64_t seq)
{
	uint8_t *f = buffer + p->header;
	const struct frame_tag tag = { FRAME_MAGIC, p->flow, seq };
	const uint32_t sum_at = p->frame_size - 8;
	uint32_t at = ETH_HEADER + sizeof(tag);
	uint64_t word = mix(p->flow, seq);

	memset(buffer, 0, p->header);
	memcpy(f, p->dst, 6);
	memcpy(f + 6, p->src, 6);
	f[12] = ETHERTYPE_EXPERIMENTAL >> 8;
	f[13] = ETHERTYPE_EXPERIMENTAL & 0xff;
	memcpy(f + ETH_HEADER, &tag, sizeof(tag));
	for (; at + 8 <= sum_at; at += 8, word += 0x0101010101010101ull)
		memcpy(f + at, &word, 8);
	memset(f + at, 0, sum_at - at);
	word = frame_sum(f, sum_at);
	memcpy(f + sum_at, &word, 8);
}

static void note_in_window(struct nic_window *w, struct nic_gap gap)
{
	/* pairs with nic_begin_window(): begin is stored last */
	int64_t begin = __atomic_load_n(&w->begin, __ATOMIC_ACQUIRE);
	int64_t end = __atomic_load_n(&w->end, __ATOMIC_RELAXED);

	if (begin && gap.end >= begin && (!end || gap.begin <= end) &&
	    gap.end - gap.begin > w->longest.end - w->longest.begin)
		w->longest = gap;
}

static void record_gap(struct nic_pair *p, int64_t now)
{
	struct nic_gap *shortest = &p->gaps[0];
	int i;

	if (!p->last_rx)
		return;
	for (i = 0; i < NIC_WINDOWS; i++)
		note_in_window(&p->windows[i], (struct nic_gap){ p->last_rx, now });
	for (i = 1; i < NIC_GAPS; i++)
		if (p->gaps[i].end - p->gaps[i].begin <
		    shortest->end - shortest->begin)
			shortest = &p->gaps[i];
	if (now - p->last_rx > shortest->end - shortest->begin)
		*shortest = (struct nic_gap){ p->last_rx, now };
}

static void account(struct nic_pair *p, const uint8_t *f, uint32_t len)
{
	struct frame_tag tag;
	uint64_t sum, *word, bit;

	if (len != p->frame_size) {
		p->corrupted++;
		return;
	}
	memcpy(&tag, f + ETH_HEADER, sizeof(tag));
	memcpy(&sum, f + len - 8, 8);
	if (tag.magic != FRAME_MAGIC || tag.flow != p->flow ||
	    tag.seq >= p->sent || sum != frame_sum(f, len - 8)) {
		p->corrupted++;
		return;
	}
	word = &p->seen[tag.seq % NIC_WINDOW / 64];
	bit = 1ull << (tag.seq % 64);
	/* the bit was cleared when this number was sent */
	if (tag.seq + NIC_WINDOW < p->sent || (*word & bit)) {
		p->duplicated++;
		return;
	}
	*word |= bit;
	p->received++;
	if (tag.seq < p->highest)
		p->reordered++;
	else
		p->highest = tag.seq + 1;
}

static void post_rx(struct nic_pair *p, uint16_t slot)
{
	p->rx.avail->ring[p->rx_avail & (p->rx.num - 1)] = htole16(slot);
	p->rx_avail++;
}

/* virtio 1.3, 2.7.10 */
static void kick(const struct nic_pair *p, const struct vring *ring, int fd,
		 uint16_t new, uint16_t old)
{
	full_barrier();
	if (p->features & SVQ_F_EVENT_IDX) {
		const uint16_t *event =
			(const uint16_t *)&ring->used->ring[ring->num];

		if ((uint16_t)(new - load_once16(event) - 1) >=
		    (uint16_t)(new - old))
			return;
	} else if (load_once16(&ring->used->flags) & VRING_USED_F_NO_NOTIFY) {
		return;
	}
	eventfd_raise(fd);
}

static uint32_t receive(struct nic_pair *p)
{
	const uint32_t header = p->header;
	uint16_t pending = load_index(&p->rx.used->idx) - p->rx_used, k;
	uint16_t posted = 0;

	if (!pending)
		return 0;
	if (pending > p->rx.num) {
		p->ring_errors++;
		return 0;
	}
	for (k = 0; k < pending && !is_set(&p->stop); k++, p->rx_used++) {
		const struct vring_used_elem *u =
			&p->rx.used->ring[p->rx_used & (p->rx.num - 1)];
		uint32_t id = load_once32(&u->id), len = load_once32(&u->len);

		if (id >= p->rx.num || len > p->buffer_size) {
			p->ring_errors++;
			continue;
		}
		account(p, p->rx_hva + (uint64_t)id * p->buffer_size + header,
			len < header ? 0 : len - header);
		post_rx(p, (uint16_t)id);
		posted++;
	}
	if (!k)
		return 0;
	store_index(&p->rx.avail->idx, p->rx_avail);
	kick(p, &p->rx, p->rx_kick, p->rx_avail, p->rx_avail - posted);
	return k;
}

static uint32_t reap_tx(struct nic_pair *p)
{
	uint16_t pending = load_index(&p->tx.used->idx) - p->tx_used, k;

	if (pending > p->tx.num) {
		p->ring_errors++;
		return 0;
	}
	for (k = 0; k < pending; k++, p->tx_used++) {
		uint32_t id = load_once32(
			&p->tx.used->ring[p->tx_used & (p->tx.num - 1)].id);

		if (id >= p->tx.num || id % p->tx_descs ||
		    p->tx_free_count >= p->tx.num / p->tx_descs) {
			p->ring_errors++;
			continue;
		}
		p->tx_free[p->tx_free_count++] = (uint16_t)id;
	}
	return pending;
}

static uint32_t transmit(struct nic_pair *p)
{
	uint32_t n = 0;

	while (is_set(&p->sending) && p->tx_free_count && !is_set(&p->stop) &&
	       p->sent - p->received < p->window) {
		uint16_t head = p->tx_free[--p->tx_free_count];
		uint64_t seq = p->sent;

		build_frame(p, p->tx_hva + (uint64_t)head * p->buffer_size, seq);
		p->seen[seq % NIC_WINDOW / 64] &= ~(1ull << (seq % 64));
		p->sent++;
		p->tx.avail->ring[p->tx_avail & (p->tx.num - 1)] =
			htole16(head);
		p->tx_avail++;
		n++;
	}
	if (n) {
		store_index(&p->tx.avail->idx, p->tx_avail);
		kick(p, &p->tx, p->tx_kick, p->tx_avail, p->tx_avail - (uint16_t)n);
	}
	return n;
}

static void set_tx_slot(struct nic_pair *p, uint16_t head)
{
	const uint32_t header = p->header;
	uint64_t gpa = p->tx_gpa + (uint64_t)head * p->buffer_size;
	struct vring_desc *d = &p->tx.desc[head];

	if (p->features & SVQ_F_INDIRECT) {
		*d = (struct vring_desc){
			.addr = htole64(p->tx_table_gpa + 32ULL * head),
			.len = htole32(32),
			.flags = htole16(VRING_DESC_F_INDIRECT),
		};
		d = &p->tx_tables[2 * head];
		head = 0; /* an index within the table */
	} else if (p->tx_descs == 1) {
		*d = (struct vring_desc){
			.addr = htole64(gpa),
			.len = htole32(header + p->frame_size),
		};
		return;
	}
	d[0] = (struct vring_desc){
		.addr = htole64(gpa),
		.len = htole32(header),
		.flags = htole16(VRING_DESC_F_NEXT),
		.next = htole16(head + 1),
	};
	d[1] = (struct vring_desc){
		.addr = htole64(gpa + header),
		.len = htole32(p->frame_size),
	};
}

/* as a driver does: a NIC that was here before may have left its indices */
static void clear_ring(const struct vring *r)
{
	memset(r->desc, 0, r->num * sizeof(*r->desc));
	memset(r->avail, 0, sizeof(*r->avail) + 2 * r->num + 2);
	memset(r->used, 0, sizeof(*r->used) + r->num * sizeof(r->used->ring[0]) + 2);
}

void nic_start(struct nic_pair *p)
{
	uint16_t i;

	clear_ring(&p->rx);
	clear_ring(&p->tx);
	p->tx_free_count = 0;
	for (i = 0; i + p->tx_descs <= p->tx.num; i += p->tx_descs) {
		set_tx_slot(p, i);
		p->tx_free[p->tx_free_count++] = i;
	}
	for (i = 0; i < p->rx.num; i++) {
		p->rx.desc[i] = (struct vring_desc){
			.addr = htole64(p->rx_gpa + (uint64_t)i * p->buffer_size),
			.len = htole32(p->buffer_size),
			.flags = htole16(VRING_DESC_F_WRITE),
		};
		post_rx(p, i);
	}
	store_index(&p->rx.avail->idx, p->rx_avail);
}

void nic_kick(const struct nic_pair *p)
{
	eventfd_raise(p->rx_kick);
	eventfd_raise(p->tx_kick);
}

void nic_clear_gaps(struct nic_pair *p)
{
	memset(p->gaps, 0, sizeof(p->gaps));
}

void nic_begin_window(struct nic_pair *p, uint32_t number, int64_t now)
{
	struct nic_window *w = &p->windows[number];

	__atomic_store_n(&w->begin, 0, __ATOMIC_RELEASE);
	w->longest = (struct nic_gap){ 0, 0 };
	w->end = 0;
	__atomic_store_n(&w->begin, now, __ATOMIC_RELEASE);
}

void nic_end_window(struct nic_pair *p, uint32_t number, int64_t now)
{
	__atomic_store_n(&p->windows[number].end, now, __ATOMIC_RELAXED);
}

void nics_begin_window(struct nic_pair **pairs, uint32_t count, uint32_t number,
		       int64_t now)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		nic_begin_window(pairs[i], number, now);
}

void nics_end_window(struct nic_pair **pairs, uint32_t count, uint32_t number,
		     int64_t now)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		nic_end_window(pairs[i], number, now);
}

static int64_t shifted(int64_t time, int64_t ns)
{
	int64_t at;

	if (__builtin_add_overflow(time, ns, &at))
		at = ns < 0 ? -REST_MAX_TIME : REST_MAX_TIME;
	return at > REST_MAX_TIME ? REST_MAX_TIME :
	       at < -REST_MAX_TIME ? -REST_MAX_TIME : at;
}

void nics_shift_clock(struct nic_pair **pairs, uint32_t count, int64_t ns)
{
	uint32_t i, k;

	for (i = 0; i < count; i++) {
		struct nic_pair *p = pairs[i];

		if (p->last_rx)
			p->last_rx = shifted(p->last_rx, ns);
		for (k = 0; k < NIC_GAPS; k++)
			if (p->gaps[k].end) {
				p->gaps[k].begin = shifted(p->gaps[k].begin, ns);
				p->gaps[k].end = shifted(p->gaps[k].end, ns);
			}
	}
}

static uint32_t nic_round(struct nic_pair *p)
{
	uint32_t received = receive(p), moved;

	if (received) {
		int64_t now = now_ns();

		record_gap(p, now);
		p->last_rx = now;
	}
	moved = reap_tx(p);
	return received + moved + transmit(p);
}

/* NAPI's way: no interrupts while there is work */
static void want_interrupts(struct nic_pair *p, int on)
{
	uint16_t flags = on ? 0 : VRING_AVAIL_F_NO_INTERRUPT;

	if (!(p->features & SVQ_F_EVENT_IDX)) {
		store_once16(&p->rx.avail->flags, flags);
		store_once16(&p->tx.avail->flags, flags);
	} else if (on) {
		store_once16(&p->rx.avail->ring[p->rx.num], p->rx_used);
		store_once16(&p->tx.avail->ring[p->tx.num], p->tx_used);
	}
	full_barrier();
}

/* Work until no work or no time remains. Returns whether it is over. */
static int nic_work(struct nic_pair *p, int64_t deadline)
{
	want_interrupts(p, 0);
	while (nic_round(p))
		if (is_set(&p->stop) || now_ns() >= deadline)
			break;
	want_interrupts(p, 1);
	/* what came before interrupts were asked for */
	return is_set(&p->stop) || now_ns() >= deadline || !nic_round(p);
}

void nic_run(struct nic_pair *p, int64_t deadline)
{
	struct pollfd fds[3] = {
		{ .fd = p->rx_call, .events = POLLIN },
		{ .fd = p->tx_call, .events = POLLIN },
		{ .fd = p->wake, .events = POLLIN },
	};

	while (gate_enter(&p->stop, &p->inside)) {
		int i;

		while (!nic_work(p, deadline))
			;
		gate_leave(&p->stop, &p->inside);
		if (is_set(&p->stop) || now_ns() >= deadline)
			return;
		if (poll(fds, 3, poll_timeout(deadline)) <= 0)
			continue;
		/* once it is stopped its eventfds may be another's */
		if (!gate_enter(&p->stop, &p->inside))
			return;
		for (i = 0; i < 3; i++)
			if (fds[i].revents & POLLIN)
				eventfd_clear(fds[i].fd);
		gate_leave(&p->stop, &p->inside);
	}
}

void nic_serve(struct nic_pair *p)
{
	while (!is_set(&p->quit)) {
		nic_run(p, INT64_MAX);
		gate_stay(&p->stop, &p->quit);
	}
}

void nics_tell(struct nic_pair **pairs, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		gate_close(&pairs[i]->stop);
}

void nics_send_no_more(struct nic_pair **pairs, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		__atomic_store_n(&pairs[i]->sending, 0, __ATOMIC_SEQ_CST);
}

int nics_have_all(struct nic_pair **pairs, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		const struct nic_pair *p = pairs[i];

		/*
		 * A thread inside may have decided to send before the
		 * request, and counts that frame later. One that enters after
		 * this look sees the request: gate_enter() stores inside first.
		 */
		if (__atomic_load_n(&p->inside, __ATOMIC_SEQ_CST) ||
		    p->received < p->sent)
			return 0;
	}
	return 1;
}

void nics_stop(struct nic_pair **pairs, uint32_t count)
{
	uint32_t i;

	/* request a stop of all before waiting for the first */
	nics_tell(pairs, count);
	for (i = 0; i < count; i++)
		gate_wait(&pairs[i]->inside);
}

void nics_go(struct nic_pair **pairs, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++) {
		gate_open(&pairs[i]->stop);
		eventfd_raise(pairs[i]->wake);
	}
}

void nics_end(struct nic_pair **pairs, uint32_t count)
{
	uint32_t i;

	nics_stop(pairs, count);
	for (i = 0; i < count; i++) {
		gate_end(&pairs[i]->stop, &pairs[i]->quit);
		eventfd_raise(pairs[i]->wake);
	}
}
