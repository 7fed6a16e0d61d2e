/* Memory that checks itself: torture FOLDER SEED THREADS MIB.
 *
 * Each thread owns mappings of every kind. A mapping is blocks of one page; what a block must hold
 * follows from its number and from how often it was written, which is noted elsewhere. Threads write
 * at random, move, drop, protect and renew mappings, and fork: children work on their copies for a
 * while, some of them after executing this program anew. A block that is not as it must be ends the
 * program with status 9. On SIGUSR1 the number of blocks checked so far is written to FOLDER/answer,
 * by rename.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, CHILDREN = 2 };
enum kind { ANON, HUGE, FILE_PRIVATE, SHARED, MEMFD, KINDS };

struct region {
	enum kind kind;
	int fd;
	size_t blocks;
	uint64_t *at;
	uint32_t *written; /* how often each block was */
	uint64_t salt;
};

struct worker {
	uint64_t random;
	struct region regions[KINDS + 2];
	int count;
	pid_t children[CHILDREN];
	size_t share; /* bytes */
};

static const char *folder;
static _Atomic uint64_t checked;
static _Atomic uint64_t salts = 1;

static uint64_t draw(struct worker *w) {
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random;
}

static uint64_t word(const struct region *r, size_t block, int i) {
	uint64_t x = r->salt * 0x9E3779B97F4A7C15u + block * 0xBF58476D1CE4E5B9u + r->written[block] * 0x94D049BB133111EBu + (uint64_t)i;
	x ^= x >> 31;
	return x * 0xD6E8FEB86659FD93u;
}

static void fail(const char *what, const struct region *r, size_t block) {
	dprintf(2, "torture: %s: kind %d block %zu written %u pid %d\n", what, r->kind, block, r->written[block], getpid());
	_exit(9);
}

static void check(const struct region *r, size_t block) {
	const uint64_t *p = r->at + block * WORDS;
	for (int i = 0; i < WORDS; i++)
		if (p[i] != (r->written[block] ? word(r, block, i) : 0))
			fail("wrong content", r, block);
	checked++;
}

static void write_block(struct region *r, size_t block) {
	check(r, block);
	r->written[block]++;
	uint64_t fresh[WORDS];
	for (int i = 0; i < WORDS; i++)
		fresh[i] = word(r, block, i);
	if (r->kind == MEMFD && r->written[block] % 3 == 0) {
		if (pwrite(r->fd, fresh, PAGE, (off_t)block * PAGE) != PAGE)
			fail("pwrite", r, block);
	} else
		memcpy(r->at + block * WORDS, fresh, PAGE);
}

static void *map(const struct region *r) {
	int anonymous = r->kind == ANON || r->kind == HUGE || r->kind == SHARED;
	int flags = (r->kind == SHARED || r->kind == MEMFD ? MAP_SHARED : MAP_PRIVATE) | (anonymous ? MAP_ANONYMOUS : 0);
	void *at = mmap(0, r->blocks * PAGE, PROT_READ | PROT_WRITE, flags, anonymous ? -1 : r->fd, 0);
	if (at == MAP_FAILED)
		fail("mmap", r, 0);
	if (r->kind == HUGE)
		madvise(at, r->blocks * PAGE, MADV_HUGEPAGE);
	return at;
}

static void make(struct region *r, enum kind kind, size_t size) {
	char path[512];
	r->kind = kind;
	r->blocks = size / PAGE;
	r->written = calloc(r->blocks, sizeof *r->written);
	r->salt = salts++;
	r->fd = -1;
	if (kind == MEMFD)
		r->fd = memfd_create("torture", 0);
	if (kind == FILE_PRIVATE) {
		snprintf(path, sizeof path, "%s/zeros-%zu", folder, size);
		if (access(path, F_OK)) { /* whole from the first moment, and made once */
			char fresh[600];
			snprintf(fresh, sizeof fresh, "%s.%d.%llu", path, getpid(), (unsigned long long)r->salt);
			int fd = open(fresh, O_RDWR | O_CREAT, 0600);
			if (ftruncate(fd, (off_t)size))
				fail("ftruncate", r, 0);
			close(fd);
			if (link(fresh, path) && access(path, F_OK))
				fail("link", r, 0);
			unlink(fresh);
		}
		r->fd = open(path, O_RDONLY);
	}
	if (kind == MEMFD && ftruncate(r->fd, (off_t)size))
		fail("ftruncate", r, 0);
	r->at = map(r);
}

static void forget(struct region *r, size_t from, size_t count) {
	memset(r->written + from, 0, count * sizeof *r->written);
}

static int private_region(const struct region *r) {
	return r->kind == ANON || r->kind == HUGE || r->kind == FILE_PRIVATE;
}

static void change_mapping(struct worker *w, struct region *r) {
	size_t from = draw(w) % r->blocks, count = 1 + draw(w) % (r->blocks - from), size = r->blocks * PAGE;
	void *place = r->at + from * WORDS;
	switch (draw(w) % 5) {
	case 0: /* what was there reads as zeros again */
		if (private_region(r)) {
			madvise(place, count * PAGE, MADV_DONTNEED);
			forget(r, from, count);
		}
		break;
	case 1: /* elsewhere */
		if (r->kind == ANON) {
			void *room = mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			void *moved = mremap(r->at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, room);
			if (moved != MAP_FAILED)
				r->at = moved;
			else /* in several parts, which before Linux 6.17 could never be moved at once */
				munmap(room, size);
		}
		break;
	case 2: /* another one, likely at the same place */
		if (private_region(r) && draw(w) % 4 == 0) {
			munmap(r->at, size);
			r->at = map(r);
			forget(r, 0, r->blocks);
		}
		break;
	case 3: /* in three parts, and one again */
		mprotect(place, count * PAGE, PROT_NONE);
		for (int i = 0; i < (int)(draw(w) % 200); i++)
			sched_yield();
		mprotect(place, count * PAGE, PROT_READ | PROT_WRITE);
		break;
	case 4: /* a page of zeros that is only read */
		check(r, from);
		break;
	}
}

static void work(struct worker *w, uint64_t steps) {
	for (uint64_t step = 0; step < steps; step++) {
		struct region *r = &w->regions[draw(w) % w->count];
		if (draw(w) % 100 == 0)
			change_mapping(w, r);
		else
			write_block(r, draw(w) % r->blocks);
	}
}

static void begin(struct worker *w, uint64_t seed, size_t share) {
	w->random = seed * 2 + 1;
	w->share = share;
	for (int i = 0; i < 5; i++)
		draw(w);
	/* Most of it where it is copied ahead: twice as much as all others together. */
	make(&w->regions[w->count++], ANON, share / 3);
	make(&w->regions[w->count++], ANON, share / 6);
	make(&w->regions[w->count++], HUGE, share / 4);
	make(&w->regions[w->count++], FILE_PRIVATE, share / 12);
	make(&w->regions[w->count++], SHARED, share / 12);
	make(&w->regions[w->count++], MEMFD, share / 12);
}

static void rest(struct worker *w) {
	struct timespec span = {0, (long)(draw(w) % 2000000)};
	nanosleep(&span, 0);
}

static void child(struct worker *w) {
	if (draw(w) % 3 == 0) {
		char seed[32];
		snprintf(seed, sizeof seed, "%llu", (unsigned long long)draw(w) % 1000000);
		execl("/proc/self/exe", "torture", folder, seed, "0", "4", (char *)0);
		_exit(8);
	}
	/* What is shared belongs to the parent. */
	int kept = 0;
	for (int i = 0; i < w->count; i++)
		if (private_region(&w->regions[i]))
			w->regions[kept++] = w->regions[i];
	w->count = kept;
	for (int i = 0; i < 100; i++) {
		work(w, 50);
		rest(w);
	}
	_exit(0);
}

static void have_children(struct worker *w) {
	int status;
	for (int i = 0; i < CHILDREN; i++) {
		if (w->children[i] > 0) {
			if (waitpid(w->children[i], &status, WNOHANG) <= 0)
				continue;
			w->children[i] = 0;
			if (status != 0) {
				dprintf(2, "torture: a child ended with %#x\n", status);
				_exit(9);
			}
		}
		if (draw(w) % 40 == 0) {
			w->children[i] = fork();
			if (w->children[i] == 0)
				child(w);
		}
	}
}

static void *brief(void *unused) {
	uint64_t used[WORDS];
	for (int i = 0; i < WORDS; i++)
		used[i] = (uint64_t)i;
	return unused ? (void *)used[3] : 0;
}

static void *__attribute__((noreturn)) run(void *argument) {
	struct worker *w = argument;
	begin(w, w->random, w->share);
	for (;;) {
		work(w, 200);
		have_children(w);
		if (draw(w) % 50 == 0) {
			pthread_t other;
			if (!pthread_create(&other, 0, brief, 0))
				pthread_join(other, 0);
		}
		rest(w);
	}
}

static void answer(void) {
	char path[512], fresh[520], text[32];
	snprintf(path, sizeof path, "%s/answer", folder);
	snprintf(fresh, sizeof fresh, "%s.new", path);
	int fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	int length = snprintf(text, sizeof text, "%llu", (unsigned long long)checked);
	if (write(fd, text, (size_t)length) != length)
		_exit(7);
	close(fd);
	rename(fresh, path);
}

int main(int argc, char **argv) {
	if (argc != 5)
		return 2;
	folder = argv[1];
	uint64_t seed = strtoull(argv[2], 0, 10);
	int threads = atoi(argv[3]);
	size_t size = (size_t)atoi(argv[4]) << 20;
	if (!threads) { /* a child that executed this anew */
		struct worker w = {0};
		begin(&w, seed, size);
		for (int i = 0; i < 30; i++) {
			work(&w, 50);
			rest(&w);
		}
		return 0;
	}
	sigset_t asked;
	sigemptyset(&asked);
	sigaddset(&asked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &asked, 0);
	struct worker *workers = calloc((size_t)threads, sizeof *workers);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;
		workers[i].random = seed * 1000 + (uint64_t)i;
		workers[i].share = size / (size_t)threads;
		if (pthread_create(&thread, 0, run, &workers[i]))
			return 3;
	}
	answer();
	for (;;) {
		int signal;
		sigwait(&asked, &signal);
		answer();
	}
}
