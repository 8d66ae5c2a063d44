/* SPDX-License-Identifier: MIT */
/*
 * The first and only program of a virtual machine that is moved. It brings up eth0, sends numbered frames and a
 * numbered byte stream, checks what comes back, writes memory that it checks before it writes it again, and reports
 * on the serial console, one line of JSON each time.
 *
 * Settings are words of the kernel's command line (the kernel gives them to its first program as variables):
 *   guest_address, peer_address   IPv4; without a peer's address frames go to the guest's own MAC (a looped device)
 *   udp_us                        time between two frames, microseconds (default 5000)
 *   udp_bytes                     payload of a frame (default 64)
 *   memory_kib, memory_pages      memory to write, and pages to write each time (default 8192 and 4)
 *   report_ms                     time between two reports (default 1000)
 * Commands come on the console: "report", "stop" (all memory is checked, no more is sent; reports when
 * all is quiet), "go",
 * "flood COUNT BYTES" (sends so many frames as fast as the device takes them), "off".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <termios.h>

#include "traffic.h"

#define ETHERTYPE 0x88b5
#define PAGE 4096
#define WORDS (PAGE / 8 - 3)
#define BLOCK 256
#define QUIET_NS 1000000000u
#define REPORT 1024 /* bytes, at most */

struct page {
	uint64_t number, generation, sum;
	uint64_t word[WORDS];
};

static struct {
	struct sockaddr_in own, peer;
	uint64_t udp_ns, report_ns;
	size_t udp_bytes, memory_pages, pages;
} set;

static struct account echo;
static uint64_t udp_sent, udp_refused;
static int udp = -1, tcp = -1, console;
static struct line told; /* what the console has to take */
static uint8_t mac[6];

static struct {
	uint64_t sent, echoed, wrong, broken, last_ns, longest_ns;
	int connected;
} stream;

static struct page *memory;
static struct {
	uint64_t written, verified, wrong, next, first_wrong;
} pages;

static uint64_t setting(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);

	return text ? strtoull(text, NULL, 0) : otherwise;
}

static int address(const char *name, struct sockaddr_in *where)
{
	const char *text = getenv(name);

	where->sin_family = AF_INET;
	return text && inet_pton(AF_INET, text, &where->sin_addr) == 1;
}

static void fail(const char *what)
{
	line_add(&told, "{\"error\":\"%s: %s\"}", what, strerror(errno));
	line_write(&told);
}

/* Give eth0 its address and switch it on. */
static void interface_up(void)
{
	struct ifreq request = {.ifr_name = "eth0"};
	int control = socket(AF_INET, SOCK_DGRAM, 0);

	while (ioctl(control, SIOCGIFHWADDR, &request) < 0)
		usleep(20000);
	memcpy(mac, request.ifr_hwaddr.sa_data, sizeof(mac));
	memcpy(&request.ifr_addr, &set.own, sizeof(set.own));
	if (set.own.sin_addr.s_addr) {
		struct sockaddr_in mask = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0xffffff00)};

		if (ioctl(control, SIOCSIFADDR, &request) < 0)
			fail("setting eth0's address");
		memcpy(&request.ifr_netmask, &mask, sizeof(mask));
		if (ioctl(control, SIOCSIFNETMASK, &request) < 0)
			fail("setting eth0's netmask");
	}
	if (ioctl(control, SIOCGIFFLAGS, &request) < 0)
		fail("reading eth0's flags");
	request.ifr_flags |= IFF_UP;
	if (ioctl(control, SIOCSIFFLAGS, &request) < 0)
		fail("switching eth0 on");
	close(control);
}

static int packet_socket(int protocol)
{
	struct sockaddr_ll where = {.sll_family = AF_PACKET, .sll_protocol = htons((uint16_t)protocol)};
	int result = socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, htons((uint16_t)protocol));

	where.sll_ifindex = (int)if_nametoindex("eth0");
	if (result < 0 || bind(result, (struct sockaddr *)&where, sizeof(where)) < 0)
		fail("opening a packet socket");
	return result;
}

static void frames_open(void)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(UDP_PORT)};

	if (!set.peer.sin_addr.s_addr) {
		udp = packet_socket(ETHERTYPE);
		return;
	}
	udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	set.peer.sin_port = htons(UDP_PORT);
	if (udp < 0 || bind(udp, (struct sockaddr *)&any, sizeof(any)) < 0)
		fail("opening the socket for frames");
}

static void frame_send(void)
{
	struct sockaddr_ll own = {.sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE), .sll_halen = 6};
	struct frame frame;
	ssize_t sent;

	frame_fill(&frame, udp_sent, set.udp_bytes);
	if (set.peer.sin_addr.s_addr) {
		sent = sendto(udp, &frame, set.udp_bytes, 0, (struct sockaddr *)&set.peer, sizeof(set.peer));
	} else {
		own.sll_ifindex = (int)if_nametoindex("eth0");
		memcpy(own.sll_addr, mac, sizeof(mac));
		sent = sendto(udp, &frame, set.udp_bytes, 0, (struct sockaddr *)&own, sizeof(own));
	}
	if (sent == (ssize_t)set.udp_bytes)
		udp_sent++;
	else
		udp_refused++;
}

static void frames_receive(void)
{
	struct sockaddr_ll from;
	struct frame frame;
	ssize_t length;
	socklen_t size;

	for (;;) {
		size = sizeof(from);
		length = recvfrom(udp, &frame, sizeof(frame), 0, (struct sockaddr *)&from, &size);
		if (length < 0)
			return;
		/* a packet socket also shows what is sent */
		if (!set.peer.sin_addr.s_addr && from.sll_pkttype == PACKET_OUTGOING)
			continue;
		/* short frames are padded on their way; the length sent is known */
		if ((size_t)length > set.udp_bytes)
			length = (ssize_t)set.udp_bytes;
		account_add(&echo, &frame, (size_t)length, now_ns(CLOCK_MONOTONIC));
	}
}

static int sending = 1;
static uint64_t quiet_at;

/* Nothing more is sent once so much time has passed without an answer. */
static void quiet_begin(void)
{
	quiet_at = now_ns(CLOCK_MONOTONIC) + QUIET_NS;
}

static void stream_open(void)
{
	struct sockaddr_in where = set.peer;
	int one = 1;

	where.sin_port = htons(TCP_PORT);
	/* a new connection restarts the stream */
	stream.sent = stream.echoed = 0;
	tcp = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	setsockopt(tcp, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	connect(tcp, (struct sockaddr *)&where, sizeof(where));
}

static void stream_break(void)
{
	stream.broken++;
	stream.connected = 0;
	close(tcp);
	tcp = -1;
}

static void stream_send(void)
{
	uint8_t block[BLOCK];
	ssize_t sent;

	stream_fill(block, sizeof(block), stream.sent);
	sent = send(tcp, block, sizeof(block), MSG_NOSIGNAL);
	if (sent > 0)
		stream.sent += (uint64_t)sent;
	else if (errno != EAGAIN)
		stream_break();
}

static void stream_receive(void)
{
	uint8_t data[4096];
	ssize_t length = recv(tcp, data, sizeof(data), 0);
	uint64_t now = now_ns(CLOCK_MONOTONIC);

	if (length == 0 || (length < 0 && errno != EAGAIN)) {
		stream_break();
		return;
	}
	if (length < 0)
		return;
	stream.wrong += stream_wrong(data, (size_t)length, stream.echoed);
	stream.echoed += (uint64_t)length;
	if (quiet_at)
		quiet_begin();
	if (stream.last_ns && now - stream.last_ns > stream.longest_ns)
		stream.longest_ns = now - stream.last_ns;
	stream.last_ns = now;
}

static uint64_t page_sum(const struct page *page)
{
	uint64_t sum = page->number * 0x9e3779b97f4a7c15u ^ page->generation;

	for (size_t i = 0; i < WORDS; i++)
		sum = (sum << 5 | sum >> 59) ^ page->word[i];
	return sum;
}

static void page_check(const struct page *page, uint64_t number)
{
	if (!page->generation)
		return;
	pages.verified++;
	if ((page->number != number || page->sum != page_sum(page)) && !pages.wrong++)
		pages.first_wrong = number;
}

/* Check a page and write something else into it. */
static void page_renew(struct page *page, uint64_t number)
{
	uint64_t value;

	page_check(page, number);
	value = number << 32 ^ ++page->generation;
	page->number = number;
	for (size_t i = 0; i < WORDS; i++)
		page->word[i] = value += 0x9e3779b97f4a7c15u;
	page->sum = page_sum(page);
	pages.written++;
}

static void memory_write(size_t count)
{
	while (count--) {
		page_renew(&memory[pages.next], pages.next);
		pages.next = (pages.next + 1) % set.pages;
	}
}

static uint64_t statistic(const char *name)
{
	char path[64], text[32];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "/sys/class/net/eth0/statistics/%s", name);
	fd = open(path, O_RDONLY);
	length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return 0;
	text[length] = 0;
	return strtoull(text, NULL, 10);
}

/* Report, unless the console has yet to take the reports before this one; whether it was done. */
static int report(const char *why)
{
	line_flush(&told);
	if (!line_takes(&told, REPORT))
		return 0;
	line_add(&told, "{\"guest\":\"%s\",\"t_ns\":%llu,\"udp\":{\"sent\":%llu,\"refused\":%llu,", why,
		 (unsigned long long)now_ns(CLOCK_MONOTONIC), (unsigned long long)udp_sent,
		 (unsigned long long)udp_refused);
	line_account(&told, &echo, udp_sent);
	line_add(&told, "},\"tcp\":{\"connected\":%d,\"sent\":%llu,\"echoed\":%llu,\"wrong\":%llu,\"broken\":%llu,",
		 stream.connected, (unsigned long long)stream.sent, (unsigned long long)stream.echoed,
		 (unsigned long long)stream.wrong, (unsigned long long)stream.broken);
	line_add(&told, "\"longest_gap_ns\":%llu},", (unsigned long long)stream.longest_ns);
	line_add(&told, "\"memory\":{\"written\":%llu,\"verified\":%llu,\"wrong\":%llu,\"first_wrong\":%llu},",
		 (unsigned long long)pages.written, (unsigned long long)pages.verified,
		 (unsigned long long)pages.wrong, (unsigned long long)pages.first_wrong);
	line_add(&told, "\"frames\":{\"tx\":%llu,\"rx\":%llu,\"tx_dropped\":%llu}}",
		 (unsigned long long)statistic("tx_packets"), (unsigned long long)statistic("rx_packets"),
		 (unsigned long long)statistic("tx_dropped"));
	line_write(&told);
	return 1;
}

/* Send frames to an address that no host has, as fast as the device takes them. */
static void flood(uint64_t count, size_t bytes)
{
	struct sockaddr_ll nobody = {.sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE), .sll_halen = 6,
				     .sll_addr = {0x52, 0x54, 0x91, 0xff, 0xff, 0xfe}};
	int out = packet_socket(0), one = 1, flags;
	uint64_t begin = now_ns(CLOCK_MONOTONIC), sent = 0, first = statistic("tx_packets");
	struct mmsghdr burst[32];
	struct iovec piece;
	static struct frame frame;

	if (bytes < 46 || bytes > sizeof(frame))
		bytes = 46;
	flags = fcntl(out, F_GETFL);
	fcntl(out, F_SETFL, flags & ~O_NONBLOCK);
	setsockopt(out, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one));
	nobody.sll_ifindex = (int)if_nametoindex("eth0");
	frame_fill(&frame, 0, bytes);
	piece = (struct iovec){&frame, bytes};
	memset(burst, 0, sizeof(burst));
	for (size_t i = 0; i < 32; i++)
		burst[i].msg_hdr = (struct msghdr){.msg_name = &nobody, .msg_namelen = sizeof(nobody),
						   .msg_iov = &piece, .msg_iovlen = 1};
	while (sent < count) {
		int more = count - sent < 32 ? (int)(count - sent) : 32;
		int done = sendmmsg(out, burst, (unsigned int)more, 0);

		if (done > 0)
			sent += (uint64_t)done;
		else
			poll(NULL, 0, 1);
	}
	line_add(&told, "{\"flood\":%llu,\"ns\":%llu,\"tx\":%llu}", (unsigned long long)sent,
		 (unsigned long long)(now_ns(CLOCK_MONOTONIC) - begin),
		 (unsigned long long)(statistic("tx_packets") - first));
	line_write(&told);
	close(out);
}

static void obey(char *command)
{
	unsigned long long count = 0, bytes = 0;

	if (sscanf(command, "flood %llu %llu", &count, &bytes) >= 1) {
		flood(count, (size_t)bytes);
	} else if (!strcmp(command, "stop")) {
		sending = 0;
		for (uint64_t number = 0; number < set.pages; number++)
			page_check(&memory[number], number);
		quiet_begin();
	} else if (!strcmp(command, "go")) {
		sending = 1;
		quiet_at = 0;
	} else if (!strcmp(command, "report")) {
		report("asked");
	} else if (!strcmp(command, "off")) {
		reboot(RB_POWER_OFF);
	}
}

static void console_read(void)
{
	static char text[128];
	static size_t length;
	ssize_t added = read(console, text + length, sizeof(text) - 1 - length);
	char *end;

	if (added <= 0)
		return;
	length += (size_t)added;
	text[length] = 0;
	while ((end = strpbrk(text, "\r\n"))) {
		*end = 0;
		obey(text);
		length -= (size_t)(end + 1 - text);
		memmove(text, end + 1, length + 1);
	}
	if (length == sizeof(text) - 1)
		length = 0;
}

static void console_quiet(void)
{
	struct termios settings;

	console = 0;
	fcntl(console, F_SETFL, O_NONBLOCK);
	if (tcgetattr(console, &settings) == 0) {
		settings.c_lflag &= ~(tcflag_t)ECHO;
		tcsetattr(console, TCSANOW, &settings);
	}
}

static void settings_read(void)
{
	address("guest_address", &set.own);
	address("peer_address", &set.peer);
	set.udp_ns = setting("udp_us", 5000) * 1000;
	set.udp_bytes = setting("udp_bytes", 64);
	if (set.udp_bytes < 46 || set.udp_bytes > sizeof(struct frame))
		set.udp_bytes = 64;
	set.report_ns = setting("report_ms", 1000) * 1000000;
	set.pages = setting("memory_kib", 8192) * 1024 / PAGE;
	set.memory_pages = set.pages ? setting("memory_pages", 4) : 0;
	memory = mmap(NULL, set.pages ? set.pages * PAGE : PAGE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
}

static void wait_for(uint64_t until)
{
	struct pollfd watched[3] = {{console, POLLIN, 0}, {udp, POLLIN, 0}, {tcp, POLLIN, 0}};
	uint64_t now = now_ns(CLOCK_MONOTONIC);
	struct timespec left = {0, 0};

	if (until > now)
		left = (struct timespec){(time_t)((until - now) / 1000000000), (long)((until - now) % 1000000000)};
	if (tcp >= 0 && !stream.connected)
		watched[2].events = POLLOUT;
	if (ppoll(watched, tcp < 0 ? 2 : 3, &left, NULL) <= 0)
		return;
	if (watched[0].revents)
		console_read();
	if (watched[1].revents)
		frames_receive();
	if (tcp < 0 || !watched[2].revents)
		return;
	if (watched[2].revents & POLLIN)
		stream_receive();
	else if (watched[2].revents & (POLLERR | POLLHUP))
		stream_break();
	else if (watched[2].revents & POLLOUT)
		stream.connected = 1;
}

int main(void)
{
	uint64_t now, tick, next_report;

	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	console_quiet();
	settings_read();
	interface_up();
	frames_open();
	report("up");
	tick = now_ns(CLOCK_MONOTONIC);
	next_report = tick + set.report_ns;
	for (;;) {
		wait_for(tick);
		now = now_ns(CLOCK_MONOTONIC);
		if (quiet_at && now >= quiet_at)
			quiet_at = report("stopped") ? 0 : now + QUIET_NS;
		line_flush(&told);
		if (now < tick)
			continue;
		if (sending) {
			frame_send();
			if (set.peer.sin_addr.s_addr && tcp < 0)
				stream_open();
			else if (stream.connected)
				stream_send();
			memory_write(set.memory_pages);
		}
		/* a beat that was missed is not made up for */
		tick = tick + set.udp_ns > now ? tick + set.udp_ns : now + set.udp_ns;
		if (set.report_ns && now >= next_report) {
			next_report = now + set.report_ns;
			report("runs");
		}
	}
}
