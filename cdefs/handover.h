/* SPDX-License-Identifier: MIT */
/*
 * The exchange of a paused guest's state, READY and GO, made by each side in
 * one go: nothing else is done in between, and no other frame is taken. Where
 * something else is there the exchange ends in front of it, and its result
 * says how far it came: it can be continued step by step from there.
 */

/*
 * A guest's state for the exchange: one section of each device, by number, and
 * number count, its own. No function may wait.
 */
struct guest_sections {
	void *of;
	uint32_t count;
	/* Write a section to at most room bytes. Returns its bytes, or -1 if it cannot be written in this way. */
	int64_t (*put)(void *of, uint32_t number, uint8_t *to, uint64_t room);
	/* Whether a section can be taken in this way. */
	int (*fits)(void *of, uint32_t number, const uint8_t *from, uint64_t length);
	/* Take a section that fits. */
	void (*take)(void *of, uint32_t number, const uint8_t *from, uint64_t length);
};

/* The frames of the exchange; pyvhostvdpa/migration/stream.py has them all. */
#define FRAME_GUEST 6
#define FRAME_FINAL 8
#define FRAME_READY 9
#define FRAME_GO 10
#define FRAME_REST 15

#define HANDOVER_WAIT_NS 200000000	/* the longest wait: signals are heard behind it */

/* ---------------------------------------------------------------------- */
/* The source                                                              */

/* How far it came. */
#define LEAVE_NOTHING 0		/* nothing was sent */
#define LEAVE_SENDING 1		/* sent bytes of the state went */
#define LEAVE_SENT 2		/* all of the state, FINAL included */
#define LEAVE_READY 3		/* READY was taken */

struct leaving {
	int fd;			/* a non-blocking socket */
	int cancel;		/* readable once the user cancelled */
	const struct guest_sections *guest;
	uint8_t *frames;	/* room bytes for the state */
	uint64_t room;
	/* what came of it */
	int result;		/* LEAVE_... */
	uint64_t length;	/* bytes of the state's frames */
	uint64_t sent;
	int64_t begin, end;	/* CLOCK_MONOTONIC, ns: the state is encoded and sent */
	uint8_t go[32];		/* the GO frame */
};

/* Encode and send the state. */
void leave(struct leaving *l);
/* Wait for READY without a hash, behind LEAVE_SENT: the result is LEAVE_READY if it was taken. */
void leave_await(struct leaving *l);
/*
 * Send GO, with the clock of now, and if it goes whole wait until the other
 * side has said something. Returns how many bytes of it went.
 */
uint64_t leave_give(struct leaving *l);

/* ---------------------------------------------------------------------- */
/* The destination                                                         */

#define ARRIVE_NOTHING 0	/* nothing was taken from the stream */
#define ARRIVE_LOADED 1		/* the state was taken; no byte of READY went */
#define ARRIVE_ANSWERING 2	/* sent bytes of READY went */
#define ARRIVE_READY 3		/* READY went whole; GO was not taken */
#define ARRIVE_GIVEN 4		/* GO was taken */

/* What is asked of a device before READY goes, and what the answer has to be. */
struct expected_answer {
	struct device_job *job;
	const uint8_t *found;
	const uint8_t *expected;
	uint64_t length;
};

struct arriving {
	int fd;
	int cancel;
	const struct guest_sections *guest;
	uint8_t *frames;
	uint64_t room;
	struct expected_answer *answers;
	uint32_t answer_count;
	uint8_t ready[24];	/* the READY frame */
	/* what came of it */
	int result;		/* ARRIVE_... */
	uint64_t length;	/* bytes of the state's frames */
	uint64_t sent;
	int64_t begin, end;	/* CLOCK_MONOTONIC, ns: the state is checked and taken */
	int64_t ready_begin;	/* the same: READY goes next */
	int64_t go_at;		/* CLOCK_MONOTONIC, ns: GO is here */
	int64_t clock;		/* the source's, as GO has it */
};

/*
 * Wait for the next frame. Whether it is GUEST, all of the state is here
 * behind it, FINAL included, and all of that fits. Nothing is taken.
 */
int arrive_look(struct arriving *a);
/* Right behind that: take the state, ask the devices, send READY, and take GO. */
void arrive(struct arriving *a);
