// case: lives of all lengths, most of some milliseconds and some of minutes (Pareto)
#include "case.h"

enum { MOST = 60000 };

static struct {
    double ends;
    void *block;
} live[MOST];
static unsigned count;

static NOINLINE void *object(void)
{
    size_t size = between(32, 320);
    return filled(malloc(size), size);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(200);) {
        double now = elapsed();
        // Nine in ten are over within five times the shortest, and nearly all within half a minute.
        double life = 0.02 * __builtin_pow(fraction(), -1 / 1.3);
        if (count < MOST) {
            live[count].ends = now + (life > 90 ? 90 : life);
            live[count++].block = object();
        }
        for (unsigned i = 0; i < count;) {
            if (live[i].ends < now) {
                free(live[i].block);
                live[i] = live[--count];
            } else {
                i++;
            }
        }
    }
}
