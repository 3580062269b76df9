// case: 1 KB a second is leaked beside 500 MB a second that is freed
#include "case.h"

static void *kept[64];

static NOINLINE void churn(void)
{
    for (int i = 0; i < 80; i++) {
        unsigned slot = below(64);
        size_t size = between(4096, 65536);
        free(kept[slot]);
        kept[slot] = malloc(size);
        if (kept[slot] == NULL)
            abort();
        memset(kept[slot], 1, 64);
    }
}

static NOINLINE void leak_note(void) { filled(malloc(256), 256); }

int main(int argc, char **argv)
{
    unsigned request = 0;
    for (begin(argc, argv); next_request(200);) {
        churn();
        if (++request % 50 == 0)
            leak_note();
    }
}
