// case: sessions are put on a list; those whose client goes without a word stay on it, one in 20
#include "case.h"

struct session {
    struct session *next;
    double ends;
    char data[180];
};

static struct session *sessions;

static NOINLINE void leak_session(void)
{
    struct session *session = filled(malloc(sizeof *session), sizeof *session);
    session->ends = one_in(20) ? 1e30 : elapsed() - 3 * __builtin_log(fraction());
    session->next = sessions;
    sessions = session;
}

static void sweep(void)
{
    double now = elapsed();
    for (struct session **link = &sessions; *link != NULL;) {
        struct session *session = *link;
        if (session->ends < now) {
            *link = session->next;
            free(session);
        } else {
            link = &session->next;
        }
    }
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(60);) {
        leak_session();
        sweep();
    }
}
