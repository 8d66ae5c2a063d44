/* SPDX-License-Identifier: MIT */
/*
 * The other end of the wire: answers numbered frames and a numbered byte stream, and keeps their account. Arrival
 * times are the kernel's own, so they do not depend on when this program gets to run.
 *
 *   vm-peer ADDRESS [REPORT_MS]
 *   vm-peer tsc                     prints how fast this processor's time stamp counter runs, kHz
 *
 * Commands on standard input: "report"; "gap BEGIN END" (ns), which asks for the longest gap between two frames that
 * overlaps this span; and its end, which ends the program after a last report.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include "traffic.h"

/* When the latest frames arrived: those of more than a quarter of an hour at one a millisecond. */
#define ARRIVALS (1u << 20)

static struct account account;
static uint64_t answered, refused;
static uint64_t arrivals[ARRIVALS], arrival_count;
static struct {
	uint64_t received, wrong, answered, connections, ended, last_ns, longest_ns, longest_begin_ns;
} stream;
static uint8_t waiting[1 << 16];
static size_t waiting_length;

static _Noreturn void give_up(const char *what)
{
	fprintf(stderr, "vm-peer: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* The kernel's time of arrival is CLOCK_REALTIME; everything else here is CLOCK_MONOTONIC. */
static uint64_t arrival_ns(struct msghdr *message)
{
	uint64_t now = now_ns(CLOCK_MONOTONIC), real = now_ns(CLOCK_REALTIME);
	struct timespec at;

	for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_TIMESTAMPNS) {
			memcpy(&at, CMSG_DATA(part), sizeof(at));
			return now - (real - ((uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec));
		}
	}
	return now;
}

static void frames_answer(int udp)
{
	uint8_t control[CMSG_SPACE(sizeof(struct timespec))];
	struct sockaddr_in from;
	struct frame frame;
	struct iovec piece = {&frame, sizeof(frame)};
	ssize_t length;

	for (;;) {
		struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof(from), .msg_iov = &piece,
					 .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
		uint64_t before = account.received;

		length = recvmsg(udp, &message, MSG_DONTWAIT);
		if (length < 0)
			return;
		account_add(&account, &frame, (size_t)length, arrival_ns(&message));
		if (account.received != before)
			arrivals[arrival_count++ % ARRIVALS] = account.last_ns;
		if (sendto(udp, &frame, (size_t)length, 0, (struct sockaddr *)&from, sizeof(from)) == length)
			answered++;
		else
			refused++;
	}
}

static int stream_accept(int listener)
{
	int one = 1, accepted = accept4(listener, NULL, NULL, SOCK_NONBLOCK);

	if (accepted < 0)
		return -1;
	setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	memset(&stream.received, 0, sizeof(stream.received));
	stream.answered = waiting_length = 0;
	stream.connections++;
	return accepted;
}

/* Echo received bytes; those that do not fit wait. Returns the socket, -1 once it has ended. */
static int stream_answer(int tcp)
{
	ssize_t length = 0;

	if (waiting_length < sizeof(waiting)) {
		uint8_t *data = waiting + waiting_length;
		uint64_t now;

		length = recv(tcp, data, sizeof(waiting) - waiting_length, 0);
		if (length == 0 || (length < 0 && errno != EAGAIN)) {
			stream.ended++;
			close(tcp);
			return -1;
		}
		if (length > 0) {
			now = now_ns(CLOCK_MONOTONIC);
			stream.wrong += stream_wrong(data, (size_t)length, stream.received);
			stream.received += (uint64_t)length;
			waiting_length += (size_t)length;
			if (stream.last_ns && now - stream.last_ns > stream.longest_ns) {
				stream.longest_ns = now - stream.last_ns;
				stream.longest_begin_ns = stream.last_ns;
			}
			stream.last_ns = now;
		}
	}
	length = waiting_length ? send(tcp, waiting, waiting_length, MSG_NOSIGNAL) : 0;
	if (length > 0) {
		stream.answered += (uint64_t)length;
		waiting_length -= (size_t)length;
		memmove(waiting, waiting + length, waiting_length);
	}
	return tcp;
}

static void report(const char *why)
{
	static struct line line;
	uint64_t end = account.received ? account.highest + 1 : 0;

	line_add(&line, "{\"peer\":\"%s\",\"t_ns\":%llu,\"udp\":{\"answered\":%llu,\"refused\":%llu,", why,
		 (unsigned long long)now_ns(CLOCK_MONOTONIC), (unsigned long long)answered,
		 (unsigned long long)refused);
	line_account(&line, &account, end);
	line_gaps(&line, &account);
	line_add(&line, "},\"tcp\":{\"received\":%llu,\"answered\":%llu,\"wrong\":%llu,\"connections\":%llu,",
		 (unsigned long long)stream.received, (unsigned long long)stream.answered,
		 (unsigned long long)stream.wrong, (unsigned long long)stream.connections);
	line_add(&line, "\"ended\":%llu,\"longest_gap_ns\":%llu,\"longest_gap_begin_ns\":%llu}}",
		 (unsigned long long)stream.ended, (unsigned long long)stream.longest_ns,
		 (unsigned long long)stream.longest_begin_ns);
	line_write(&line);
}

/* null if the frames before the span are no longer known, or none came after it yet. */
static void report_gap(uint64_t begin, uint64_t end)
{
	static struct line line;
	uint64_t oldest = arrival_count > ARRIVALS ? arrival_count - ARRIVALS : 0;
	struct gap longest = {0, 0};
	int known = arrival_count && arrivals[oldest % ARRIVALS] <= begin && account.last_ns >= end;

	for (uint64_t i = oldest + 1; known && i < arrival_count; i++) {
		struct gap gap = {arrivals[(i - 1) % ARRIVALS], 0};
		uint64_t next = arrivals[i % ARRIVALS];

		gap.ns = next > gap.begin_ns ? next - gap.begin_ns : 0;
		if (gap.begin_ns < end && next > begin && gap.ns > longest.ns)
			longest = gap;
	}
	if (known)
		line_add(&line, "{\"gap\":[%llu,%llu]}", (unsigned long long)longest.begin_ns,
			 (unsigned long long)longest.ns);
	else
		line_add(&line, "{\"gap\":null}");
	line_write(&line);
}

static int command(void)
{
	char text[256], *word, *rest = NULL;
	ssize_t length = read(0, text, sizeof(text) - 1);

	if (length <= 0)
		return 0;
	text[length] = 0;
	for (word = strtok_r(text, "\n", &rest); word; word = strtok_r(NULL, "\n", &rest)) {
		unsigned long long begin, end;

		if (sscanf(word, "gap %llu %llu", &begin, &end) == 2)
			report_gap(begin, end);
		else
			report("asked");
	}
	return 1;
}

/* A guest without ACPI has nothing to measure its own counter by, and under emulation it is this machine's. */
static int print_tsc(void)
{
	uint64_t begin_ns = now_ns(CLOCK_MONOTONIC), begin = __builtin_ia32_rdtsc(), end_ns, end;

	do {
		end_ns = now_ns(CLOCK_MONOTONIC);
		end = __builtin_ia32_rdtsc();
	} while (end_ns - begin_ns < 200000000);
	printf("%llu\n", (unsigned long long)((end - begin) * 1000000 / (end_ns - begin_ns)));
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in where = {.sin_family = AF_INET};
	int udp, listener, tcp = -1, one = 1;
	uint64_t next = 0, every = argc > 2 ? strtoull(argv[2], NULL, 0) * 1000000 : 0;

	if (argc == 2 && !strcmp(argv[1], "tsc"))
		return print_tsc();
	if (argc < 2 || inet_pton(AF_INET, argv[1], &where.sin_addr) != 1) {
		fprintf(stderr, "usage: vm-peer ADDRESS [REPORT_MS]\n");
		return 2;
	}
	udp = socket(AF_INET, SOCK_DGRAM, 0);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(udp, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof(one));
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	where.sin_port = htons(UDP_PORT);
	if (bind(udp, (struct sockaddr *)&where, sizeof(where)) < 0)
		give_up("binding the socket for frames");
	where.sin_port = htons(TCP_PORT);
	if (bind(listener, (struct sockaddr *)&where, sizeof(where)) < 0 || listen(listener, 4) < 0)
		give_up("listening for the stream");
	report("up");
	next = now_ns(CLOCK_MONOTONIC) + every;
	for (;;) {
		struct pollfd watched[4] = {{0, POLLIN, 0}, {udp, POLLIN, 0}, {listener, POLLIN, 0}, {tcp, 0, 0}};

		watched[3].events = (short)((waiting_length < sizeof(waiting) ? POLLIN : 0) |
					    (waiting_length ? POLLOUT : 0));
		poll(watched, 4, every ? (int)(every / 1000000) : -1);
		if (watched[1].revents)
			frames_answer(udp);
		if (tcp >= 0 && watched[3].revents)
			tcp = stream_answer(tcp);
		if (watched[2].revents) {
			/* a guest has one stream: that of one that was killed would never end */
			if (tcp >= 0)
				close(tcp);
			stream.ended += tcp >= 0;
			tcp = stream_accept(listener);
		}
		if (watched[0].revents && !command())
			break;
		if (every && now_ns(CLOCK_MONOTONIC) >= next) {
			next = now_ns(CLOCK_MONOTONIC) + every;
			report("runs");
		}
	}
	report("ended");
	return 0;
}
