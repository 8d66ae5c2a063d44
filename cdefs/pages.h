/* SPDX-License-Identifier: MIT */
/*
 * Guest memory on its way to another process: what was written, how it is
 * framed, and that it arrived as it left. Plain declarations, as in ring.h.
 */

/*
 * The checksum of every frame on a migration's stream. It finds corruption,
 * not forgery: TLS is for that.
 */
uint64_t stream_sum(const uint8_t *bytes, uint64_t length);

#define SUM_LANES 8

/* The same of bytes that come in parts. */
struct running_sum {
	uint64_t lane[SUM_LANES];
	uint64_t length;
};

void sum_begin(struct running_sum *s);
/* Take in a multiple of 8 bytes. */
void sum_words(struct running_sum *s, const uint8_t *bytes, uint64_t length);
/* Copy a multiple of 64 bytes, aligned to 8, and take in what was copied; others may write there. */
void sum_copy(struct running_sum *s, uint8_t *to, const uint8_t *from, uint64_t length);
/* Take in a multiple of 64 bytes. */
void sum_blocks(struct running_sum *s, const uint8_t *bytes, uint64_t length);
/* Nothing may be taken in afterwards. */
uint64_t sum_end(struct running_sum *s);

/* ---------------------------------------------------------------------- */
/* Sets of guest pages: one bit per 4 KiB, one bitmap per region           */

#define GUEST_PAGE 4096

uint64_t pages_count(const uint64_t *bits, uint64_t words);
/* How many are in both. */
uint64_t pages_common(const uint64_t *bits, const uint64_t *others, uint64_t words);
/* Set count bits from first on. */
void pages_mark(uint64_t *bits, uint64_t first, uint64_t count);
void pages_add(uint64_t *bits, const uint64_t *more, uint64_t words);
/* Move the marks in log to bits, and to seen unless that is NULL, while others keep marking. */
void pages_drain(uint64_t *bits, uint64_t *seen, uint64_t *log, uint64_t words);
/*
 * Set in a bitmap of size bytes, which another process empties meanwhile, the
 * bits of the pages that are set in bits: page first + n for bit n, as
 * vhost-user counts them (byte page / 8, bit page % 8). Returns the pages that
 * are beyond the bitmap.
 */
uint64_t pages_publish(const uint64_t *bits, uint64_t words, uint64_t first,
		       uint8_t *log, uint64_t size);
/*
 * After pages_drain: a thread that found a page already marked has by now made
 * visible what it wrote there before it looked. once before the first use.
 * 0 or errno.
 */
int pages_barrier_prepare(void);
int pages_barrier(void);

/* ---------------------------------------------------------------------- */
/* What the processes of this machine write through their page tables      */

/* A userfaultfd that lets writes through and remembers them, or -errno. */
int written_open(void);
/* Watch a mapping from now on; 0 or errno. It ends with the descriptor. */
int written_watch(int uffd, uint8_t *start, uint64_t size);
/*
 * Add what was written since to bits (bit 0 is start), and watch on, in one
 * step a page. pagemap is /proc/self/pagemap. 0 or errno.
 */
int written_collect(int pagemap, uint8_t *start, uint64_t size, uint64_t *bits);
/* The same behind aside_move(): a page that has no entry was not used. */
int written_collect_used(int pagemap, uint8_t *start, uint64_t size, uint64_t *bits);
/*
 * The same from pagemap's entries, each of pages guest pages: those that are
 * soft-dirty, and absent ones, whose state it does not show.
 */
void written_soft_dirty(const uint64_t *entries, uint64_t count, uint64_t pages,
			uint64_t *bits, uint64_t first);

/* Addresses for the page tables of a mapping; NULL if there are none left. unmap_memory() gives them back. */
uint8_t *aside_reserve(const uint8_t *start, uint64_t size);
/*
 * Move the page tables of a watched mapping of a file to reserved addresses,
 * which are watched too. The mapping has none behind it: what is in its tables
 * later was used since, and is locked, as by lock_used(); *unlocked is why not,
 * or 0. 0, or errno: nothing has moved, and the addresses are not ours any more.
 */
int aside_move(int uffd, uint8_t *start, uint64_t size, uint8_t *aside, int *unlocked);
/* Keep what is used of a mapping from now on from being swapped out, or no longer; 0 or errno. */
int lock_used(uint8_t *start, uint64_t size);
int unlock_used(uint8_t *start, uint64_t size);

/* ---------------------------------------------------------------------- */
/* Pages on the stream                                                     */

#define FRAME_PAGES 256		/* type: runs, then what they hold */
#define FRAME_ZERO 257		/* type: runs that hold zeros */
#define FRAME_HEADER 24		/* bytes: u32 type, count, u64 length, sum */
#define FRAME_RUNS 1024		/* in one frame at most */
#define FRAME_DATA 4194304	/* bytes of pages in one frame at most */
#define FRAME_ZEROS 67108864	/* bytes that one frame says are zero at most */
#define FRAME_RUN_BYTES 16

#define SENDER_PAGES 24		/* in one frame, so that it stays in the cache and a socket takes it whole */
#define SENDER_DATA_AT 4096	/* header and runs end where the pages begin */
#define RECEIVER_DATA_AT 20480	/* the same, with room for FRAME_RUNS */

/* How a loop below ended. */
#define MOVE_AGAIN 0		/* the time is over, there is more */
#define MOVE_DONE 1
#define MOVE_CANCELLED 2
#define MOVE_BROKEN 3		/* see error; 0 is the end of the stream */
#define MOVE_STALLED 4
#define MOVE_CORRUPT 5		/* see fault */

/* Why a frame was refused. */
#define FAULT_COUNT 1		/* no runs, or too many */
#define FAULT_LENGTH 2		/* the payload is not what the runs need */
#define FAULT_SUM 3
#define FAULT_RUN 4		/* a run that is empty or no whole pages */
#define FAULT_ADDRESS 5		/* a run that is not one piece of guest memory */

struct page_run {
	uint64_t gpa;
	uint64_t length;
};

struct page_sender {
	const struct memory_map *memory;
	const uint64_t **bits;	/* the set to send, one bitmap per region */
	uint8_t *frame;		/* SENDER_DATA_AT + SENDER_PAGES pages */
	uint32_t first;		/* offset of its first byte */
	uint32_t begin, end;	/* offsets of the unsent bytes */
	uint32_t frame_pages;	/* SENDER_PAGES, or fewer */
	uint32_t region;
	uint64_t page;		/* the next to look at in the region */
	uint32_t zero_runs;	/* found, not sent yet */
	uint32_t zeros_left;	/* bytes that may be added to them */
	struct page_run *zeros;	/* FRAME_RUNS */
	uint64_t limit;		/* bytes per second, 0 for none */
	int64_t due;		/* CLOCK_MONOTONIC, ns: nothing goes before, by the limit */
	int64_t moved_at;	/* when a byte went last */
	int64_t stall;		/* ns without one after which the peer counts as lost */
	int cancel;		/* eventfd that ends it, or -1 */
	int cancelled;		/* it was seen within a frame */
	uint32_t unasked;	/* frames since it was looked at */
	int error;		/* errno */
	uint64_t pages, zero_pages;
	uint64_t bytes;		/* on the stream */
};

/* Send the set from its beginning. */
void pages_begin(struct page_sender *s);
/*
 * Make the next frame if the last one is sent: the number of bytes to
 * send, 0 at the end. They are at frame + begin; move begin when they are sent.
 */
uint32_t pages_next(struct page_sender *s);
/* Wait until the limit lets the next frame go: MOVE_DONE, or MOVE_AGAIN when deadline has passed. */
int pages_pause(struct page_sender *s, int64_t deadline);
/* Send to a socket until all is sent or deadline (CLOCK_MONOTONIC, ns) has passed: MOVE_... */
int pages_send(struct page_sender *s, int fd, int64_t deadline);

struct page_receiver {
	const struct memory_map *memory;
	uint8_t *frame;		/* RECEIVER_DATA_AT + FRAME_DATA */
	uint32_t at;		/* where in it the header begins */
	uint32_t type, count;	/* the frame's header */
	uint64_t length, sum;
	uint64_t got;		/* of the frame; the first header is read before */
	int64_t moved_at;
	int64_t stall;
	int cancel;
	int error;
	int fault;		/* FAULT_... */
	struct page_run wrong;	/* the run that was refused */
	uint64_t pages, zero_pages;
	uint64_t bytes;
	int64_t written_at;	/* when the last frame's pages were in place; CLOCK_MONOTONIC, ns */
	/* the pages that have had content, one bitmap per region; NULL if memory was not all zeros before */
	uint64_t **filled;
};

/* Whether a payload as the header has it may be read: MOVE_DONE or MOVE_CORRUPT. */
int pages_expect(struct page_receiver *r);
/* Check the payload, then write it to guest memory: MOVE_DONE or MOVE_CORRUPT. */
int pages_apply(struct page_receiver *r);
/*
 * Read the payload from a socket and apply it, then the page frames
 * that follow, until another frame follows, nothing does for a moment, or
 * deadline has passed. MOVE_AGAIN is in the middle of a frame.
 */
int pages_receive(struct page_receiver *r, int fd, int64_t deadline);
