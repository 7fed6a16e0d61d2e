// hold: the first process of a container whose workload can be checkpointed and restored.
//
//   hold install DIR      copy this program to DIR/hold
//   hold run CMD...       run CMD
//   hold wait             wait, as a placeholder, for a restored workload
//   hold auto CMD...      wait if CKPT_AGENT_RESTORE is set and nothing was restored here before,
//                         else run CMD
//   hold hook CMD...      in a container of hold's: CMD if a workload runs there; nothing in a placeholder
//   hold running          in a container of hold's: status 0 if a workload runs there
//
// "run" makes two processes: hold itself, and below it the stem, which starts CMD. The stem is the
// root of the tree that is dumped and restored; it holds no descriptors but the standard three,
// adopts what CMD daemonizes, and ends with CMD's status. A placeholder has no child: a restore
// makes a stem below it, and the node agent names that one to hold by SIGUSR2 with a value (see
// "adopted"). From then on both are the same: hold passes signals on to its stem and ends with its
// status.
//
// Before the agent kills a tree that it has stored, it sends the negative of the stem's number:
// killed in that state, the stem leaves a placeholder behind instead of ending the container, which
// the kubelet would start anew from the beginning. Naming the stem again takes it back.
//
// Promises: CMD gets the descriptors, signal state, environment (less the two variables above),
// terminal and privileges that an ordinary container start would have given it. Children are
// reaped at once, since a zombie's number cannot be restored. /proc/1/cmdline tells the state:
// "hold: waiting", "hold: following PID" or "hold: stopping PID". Does not allocate, read configuration, or write but for
// error messages and one stamp file. Linux only.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STAMP "/.ckpt-agent/restored-"

// A shell's statuses, which the users of containers know.
enum { WAITS = 1, FAILED = 1, USAGE = 64, NO_FORK = 71, CANNOT_RUN = 126, NOT_FOUND = 127, SIGNALED = 128 };

// The agent may name the root while CRIU is still its parent; this long it may take to become ours.
// CRIU lets go within milliseconds.
enum { PENDING_TRIES = 500, PENDING_NS = 20 * 1000 * 1000 };

// Between its exec and the choice of what to do, pid 1 shows its arguments; that takes no time.
enum { STATE_TRIES = 500 };

// The dead that a placeholder remembers: one is enough for the restored root itself; the others are
// orphans of probes and of execs, which may end in the same instant.
enum { REMEMBERED = 256 };

// The kernel's own signal set: the library's leaves out the signals that it uses itself.
typedef unsigned long long signals;
static const signals every = ~0ULL;

// What hold was started with, which CMD gets unchanged.
static signals mask_before;
static struct sigaction sigchld_before;

static char *title; // what /proc/PID/cmdline shows: the memory of the arguments
static size_t title_size;

static int fail(int status, const char *what) {
    fprintf(stderr, "hold: %s: %s\n", what, strerror(errno));
    return status;
}

static int usage(void) {
    fprintf(stderr, "usage: hold install DIR | run CMD... | wait | auto CMD... | hook CMD... | running\n");
    return USAGE;
}

static int status_of(int st) {
    return WIFSIGNALED(st) ? SIGNALED + WTERMSIG(st) : WEXITSTATUS(st);
}

// Takes the place of the arguments, which also keeps "pkill -f CMD" in the container from hitting
// hold. A text that does not fit is left out rather than cut: half a pid is another pid.
static void show(const char *format, ...) {
    char text[64];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memset(title, 0, title_size);
    if (strlen(text) < title_size)
        memcpy(title, text, strlen(text));
    else if (title_size > strlen("hold"))
        memcpy(title, "hold", strlen("hold"));
}

// The next signal, or 0 if none came in time or a stop interrupted the wait, as a dump does. The
// library's function would retry by itself.
static int next_signal(siginfo_t *info, const struct timespec *timeout) {
    int number = (int)syscall(SYS_rt_sigtimedwait, &every, info, timeout, sizeof every);
    return number < 0 ? 0 : number;
}

// Alive or dead, but not reaped: as long as this holds, the number belongs to nobody else.
static int is_child(pid_t pid) {
    siginfo_t info;
    return waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

// Becomes CMD; returns the status to end with if that fails.
static int become(char **command) {
    unsetenv("CKPT_AGENT_RESTORE");
    unsetenv("CKPT_AGENT_CONTAINER");
    execvp(command[0], command);
    return fail(errno == ENOENT ? NOT_FOUND : CANNOT_RUN, command[0]);
}

static void start_workload(char **command) {
    // As an ordinary container's first process: leader of a session, with its terminal if it has one.
    setsid();
    if (isatty(0))
        ioctl(0, TIOCSCTTY, 0);
    sigaction(SIGCHLD, &sigchld_before, NULL);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask_before, NULL, sizeof mask_before);
    _exit(become(command));
}

// The root of the tree that is dumped. It may wake up in another pod: it keeps nothing that ties it
// to this one.
static void run_stem(char **command) {
    setsid();
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t workload = fork();
    if (workload < 0)
        _exit(fail(NO_FORK, "cannot fork"));
    if (workload == 0)
        start_workload(command);
    syscall(SYS_close_range, 3, ~0U, 0);
    show("hold: stem");
    for (;;) {
        siginfo_t info;
        int st, number = next_signal(&info, NULL);
        if (number && number != SIGCHLD)
            kill(workload, number);
        for (pid_t pid; (pid = waitpid(-1, &st, WNOHANG)) > 0;)
            if (pid == workload)
                _exit(status_of(st));
    }
}

// Signals that an unprepared program ignores, and those that stop it.
static int ends_a_program(int number) {
    switch (number) {
    case 0: case SIGCHLD: case SIGCONT: case SIGURG: case SIGWINCH:
    case SIGSTOP: case SIGTSTP: case SIGTTIN: case SIGTTOU:
        return 0;
    default:
        return 1;
    }
}

// So that a restart of this container is an ordinary start, whatever happens to the agent.
static void stamp(void) {
    char path[PATH_MAX];
    const char *container = getenv("CKPT_AGENT_CONTAINER");
    if (!container || snprintf(path, sizeof path, STAMP "%s", container) >= (int)sizeof path)
        return;
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd >= 0)
        close(fd);
}

// The stem that hold follows, or is told to: "named" until it is our child, then "stem". "stopping":
// it may be killed.
static struct { pid_t stem, named; int tries, stopping; } followed;
static struct { pid_t pid; int st; } dead[REMEMBERED];
static unsigned deaths;

static void follow(pid_t pid) {
    followed.stem = pid;
    followed.named = followed.stopping = 0;
    show("hold: following %d", (int)pid);
}

// Whether this signal is the agent's: a value, sent from outside the pid namespace, where a sender
// has no number. A process inside could forge it; it would only mislead its own container.
static int from_agent(int number, const siginfo_t *info) {
    return number == SIGUSR2 && info->si_code == SI_QUEUE && info->si_pid == 0;
}

static void heed_agent(pid_t value) {
    if (!followed.stem && value > 1) {
        followed.named = value;
        followed.tries = PENDING_TRIES;
    } else if (followed.stem && value == followed.stem) {
        follow(value);
    } else if (followed.stem && value == -followed.stem) {
        followed.stopping = 1;
        show("hold: stopping %d", (int)followed.stem);
    }
}

static void reap(void) {
    int st;
    for (pid_t pid; (pid = waitpid(-1, &st, WNOHANG)) > 0;) {
        if (pid == followed.stem) {
            if (!followed.stopping || status_of(st) != SIGNALED + SIGKILL)
                _exit(status_of(st));
            followed.stem = 0;
            show("hold: waiting");
            continue;
        }
        if (pid == followed.named) {
            stamp();
            _exit(status_of(st));
        }
        if (!followed.stem) {
            dead[deaths % REMEMBERED].pid = pid;
            dead[deaths++ % REMEMBERED].st = st;
        }
    }
}

// Settles what the agent named: our child now (followed from here on), dead and reaped before the
// name came (we end as it did), still CRIU's (asked again soon), or nothing of ours (forgotten).
static void adopt(void) {
    pid_t pid = followed.named;
    if (is_child(pid)) {
        stamp();
        follow(pid);
        return;
    }
    if (kill(pid, 0) == 0 || errno != ESRCH) {
        if (--followed.tries <= 0)
            followed.named = 0;
        return;
    }
    // The newest first: an earlier restore that failed may have left the same number.
    for (unsigned i = deaths; i > 0 && i + REMEMBERED > deaths; i--)
        if (dead[(i - 1) % REMEMBERED].pid == pid) {
            stamp();
            _exit(status_of(dead[(i - 1) % REMEMBERED].st));
        }
    followed.named = 0;
}

static int hold(char **command) {
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &every, &mask_before, sizeof every);
    // Whoever ignores SIGCHLD never learns how its children end, and that is inherited.
    sigaction(SIGCHLD, &(struct sigaction){.sa_handler = SIG_DFL}, &sigchld_before);
    prctl(PR_SET_CHILD_SUBREAPER, 1); // pid 1 is one anyway; in a shared pid namespace it is not pid 1
    if (command) {
        // The terminal is the workload's. Letting go of it hangs it up: that SIGHUP is not for it.
        if (isatty(0) && ioctl(0, TIOCNOTTY) == 0) {
            const signals hangup = 1ULL << (SIGHUP - 1) | 1ULL << (SIGCONT - 1);
            const struct timespec now = {0, 0};
            siginfo_t info;
            while (syscall(SYS_rt_sigtimedwait, &hangup, &info, &now, sizeof hangup) > 0)
                ;
        }
        pid_t stem = fork();
        if (stem < 0)
            return fail(NO_FORK, "cannot fork");
        if (stem == 0)
            run_stem(command);
        follow(stem);
    } else {
        show("hold: waiting");
    }
    syscall(SYS_close_range, 3, ~0U, 0);
    for (;;) {
        const struct timespec soon = {0, PENDING_NS};
        siginfo_t info;
        int number = next_signal(&info, followed.named ? &soon : NULL);
        if (from_agent(number, &info)) {
            // Never passed on: to a workload that runs already it would be a deadly stray.
            heed_agent(info.si_value.sival_int);
        } else if (followed.stem) {
            if (number && number != SIGCHLD)
                kill(followed.stem, number);
        } else if (ends_a_program(number) && number != SIGUSR2) {
            return SIGNALED + number;
        }
        reap();
        if (followed.named)
            adopt();
    }
}

// Whether pid 1 of this container says that a workload runs: 0, WAITS, or another status if it does
// not say so in time.
static int state(void) {
    const struct timespec pause = {0, PENDING_NS};
    for (int tries = STATE_TRIES; tries > 0; tries--) {
        char said[64];
        int fd = open("/proc/1/cmdline", O_RDONLY | O_CLOEXEC);
        ssize_t size = fd < 0 ? -1 : read(fd, said, sizeof said - 1);
        if (size < 0)
            return fail(CANNOT_RUN, "/proc/1/cmdline");
        close(fd);
        said[size] = 0;
        if (!strcmp(said, "hold: waiting"))
            return WAITS;
        if (!strncmp(said, "hold: following ", 16) || !strncmp(said, "hold: stopping ", 15))
            return 0;
        nanosleep(&pause, NULL);
    }
    errno = ETIMEDOUT;
    return fail(CANNOT_RUN, "/proc/1/cmdline");
}

// What a container's owner wants done when its workload starts or is about to end. In a placeholder
// neither is the case: it started long ago and elsewhere, or was stored and stopped.
static int hook(char **command) {
    int status = state();
    return status == 0 ? become(command) : status == WAITS ? 0 : status;
}

static int install(const char *directory) {
    char path[PATH_MAX], new[PATH_MAX], buffer[1 << 16];
    struct stat about;
    ssize_t size = 0;
    if (snprintf(path, sizeof path, "%s/hold", directory) >= (int)sizeof path ||
        snprintf(new, sizeof new, "%s/.hold.%d", directory, (int)getpid()) >= (int)sizeof new) {
        errno = ENAMETOOLONG;
        return fail(FAILED, directory);
    }
    int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (from < 0 || fstat(from, &about) < 0)
        return fail(FAILED, "/proc/self/exe");
    unlink(new); // of an installation that was killed
    int to = open(new, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0700);
    if (to < 0)
        return fail(FAILED, new);
    while ((size = read(from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0, n; done < size; done += n)
            if ((n = write(to, buffer + done, (size_t)(size - done))) < 0)
                goto failed;
    // The time is kept, since a restore compares the programs of a tree with the files it finds.
    const struct timespec times[2] = {about.st_atim, about.st_mtim};
    if (size == 0 && fchmod(to, 0755) == 0 && futimens(to, times) == 0 && rename(new, path) == 0)
        return 0;
failed:
    fail(FAILED, path);
    unlink(new);
    return FAILED;
}

// Fails closed: where it cannot be told whether a restore took place, the container waits, and
// never starts anew over a job that should go on.
static int must_wait(void) {
    char path[PATH_MAX];
    const char *image = getenv("CKPT_AGENT_RESTORE"), *container = getenv("CKPT_AGENT_CONTAINER");
    if (!image || !*image)
        return 0;
    if (!container || snprintf(path, sizeof path, STAMP "%s", container) >= (int)sizeof path)
        return 1;
    return access(path, F_OK) != 0;
}

int main(int argc, char **argv) {
    if (argc < 2)
        return usage();
    const char *mode = argv[1];
    title = argv[0];
    title_size = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) + 1 - argv[0]);
    if (!strcmp(mode, "install") && argc == 3)
        return install(argv[2]);
    if (!strcmp(mode, "wait") && argc == 2)
        return hold(NULL);
    if (!strcmp(mode, "run") && argc > 2)
        return hold(argv + 2);
    if (!strcmp(mode, "hook") && argc > 2)
        return hook(argv + 2);
    if (!strcmp(mode, "running") && argc == 2)
        return state();
    if (!strcmp(mode, "auto") && argc > 2)
        return hold(must_wait() ? NULL : argv + 2);
    return usage();
}
