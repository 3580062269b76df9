// case: sessions of about four seconds, of which there are five times as many at the end as in the beginning
#include "case.h"

enum { MOST = 4000 };

static struct {
    double ends;
    void *state;
} sessions[MOST];
static unsigned count;

static NOINLINE void *session(void) { return filled(malloc(700), 700); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        double now = elapsed();
        unsigned often = now < case_seconds / 2 ? (unsigned)(5 - 8 * now / case_seconds) : 1;
        if (count < MOST && one_in(often)) {
            sessions[count].ends = now - 4 * __builtin_log(fraction());
            sessions[count++].state = session();
        }
        for (unsigned i = 0; i < count;) {
            if (sessions[i].ends < now) {
                free(sessions[i].state);
                sessions[i] = sessions[--count];
            } else {
                i++;
            }
        }
    }
}
