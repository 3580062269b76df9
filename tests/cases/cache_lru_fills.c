// case: a cache of 6,000 entries that is filled for a minute, and then throws out what was used longest ago
#include "case.h"

enum { ENTRIES = 6000 };

struct entry {
    uint64_t key;
    char value[200];
};

static struct entry *entries[ENTRIES];
static unsigned next;

static NOINLINE struct entry *entry(uint64_t key)
{
    struct entry *entry = filled(malloc(sizeof *entry), sizeof *entry);
    entry->key = key;
    return entry;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        scratch();
        free(entries[next % ENTRIES]);
        entries[next++ % ENTRIES] = entry(random_bits());
    }
}
