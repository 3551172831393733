/* Threads for the kernels. A caller shares its work and does all of it that nobody else takes: it waits for workers that
   are at it, never for one that has not come, so that a busy machine costs it little. Workers look out for more for a
   while, as the layers of a model follow each other closely, and then sleep. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include "kernels.h"

#define LOOKS 20000 /* some tenths of a millisecond */
#define MOST_WORKERS 255

static struct {
    pthread_mutex_t lock; /* of workers, sleeping */
    pthread_cond_t wake;
    int taken, workers, sleeping, wanted, active; /* active: workers that may be at the work */
    long turn;                                    /* odd while there is work */
    void (*work)(void *);
    void *job;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#define GET(field) __atomic_load_n(&pool.field, __ATOMIC_SEQ_CST)
#define SET(field, value) __atomic_store_n(&pool.field, value, __ATOMIC_SEQ_CST)
#define ADD(field, value) __atomic_add_fetch(&pool.field, value, __ATOMIC_SEQ_CST)

static void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The turn of work not yet `seen`. */
static long next_turn(long seen) {
    for (int looks = 0; looks < LOOKS; looks++) {
        long turn = GET(turn);
        if (turn & 1 && turn != seen) return turn;
        rest();
    }
    pthread_mutex_lock(&pool.lock);
    ADD(sleeping, 1);
    long turn;
    while (!((turn = GET(turn)) & 1) || turn == seen) pthread_cond_wait(&pool.wake, &pool.lock);
    ADD(sleeping, -1);
    pthread_mutex_unlock(&pool.lock);
    return turn;
}

static void *worker(void *place) {
    for (long turn = 0;;) {
        turn = next_turn(turn);
        ADD(active, 1); /* before looking again: share() closes the turn before it counts who is active */
        if (GET(turn) == turn && (intptr_t)place < pool.wanted) pool.work(pool.job);
        ADD(active, -1);
    }
    return 0;
}

/* A forked child has none of the threads. */
static void forget(void) {
    pthread_mutex_init(&pool.lock, 0);
    pthread_cond_init(&pool.wake, 0);
    pool.taken = pool.workers = pool.sleeping = pool.active = 0;
    pool.turn = 0;
}

static void hire(int count) {
    static int told;
    sigset_t all, before;
    pthread_t thread;
    pthread_mutex_lock(&pool.lock);
    if (!told) told = !pthread_atfork(0, 0, forget);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the program */
    while (told && pool.workers < count) {
        if (pthread_create(&thread, 0, worker, (void *)(intptr_t)pool.workers)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    pthread_mutex_unlock(&pool.lock);
}

/* `work` is called by up to so many threads at the same time, this one among them, and returns when there is no more to
   do. One caller at a time has the workers; another does its work alone. */
void share(int threads, void (*work)(void *), void *job) {
    int wanted = (int)least(threads - 1, MOST_WORKERS);
    if (wanted < 1 || __atomic_exchange_n(&pool.taken, 1, __ATOMIC_SEQ_CST)) {
        work(job);
        return;
    }
    if (pool.workers < wanted) hire(wanted);
    pool.work = work, pool.job = job, pool.wanted = wanted;
    ADD(turn, 1);
    if (GET(sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work(job);
    ADD(turn, 1);
    for (int looks = 0; GET(active); looks++)
        if (looks < LOOKS) rest();
        else sched_yield();
    SET(taken, 0);
}
