// case: connections are made when all are in use, and closed after ten seconds without any
#include "case.h"

enum { MOST = 200 };

struct connection {
    double idle_since;
    int in_use;
    char buffer[4096];
};

static struct connection *connections[MOST];

static NOINLINE struct connection *connect_new(void) { return filled(calloc(1, sizeof(struct connection)), 64); }

static void use(void)
{
    for (int i = 0; i < MOST; i++) {
        if (connections[i] == NULL)
            connections[i] = connect_new();
        else if (connections[i]->in_use)
            continue;
        connections[i]->in_use = 1;
        return;
    }
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        scratch();
        double now = elapsed();
        // Some are always busy, and many at the same time now and then.
        if (one_in((unsigned)(now / 7) % 4 == 0 ? 2 : 8))
            use();
        for (int i = 0; i < MOST; i++) {
            struct connection *connection = connections[i];
            if (connection == NULL)
                continue;
            if (connection->in_use && one_in(60)) {
                connection->in_use = 0;
                connection->idle_since = now;
            } else if (!connection->in_use && now - connection->idle_since > 10) {
                free(connection);
                connections[i] = NULL;
            }
        }
    }
}
