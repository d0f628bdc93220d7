/* Run functions on buffers: run_table FILE reads both, and writes the buffers to FILE.out.

   All numbers are of 64 bits: how many buffers, the size of each, their bytes; how many calls, and of each the function,
   how many buffers its table has, which, and the three other arguments. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void function(void **, int64_t, int64_t, int64_t);
extern function *const functions[];

static FILE *file;

static int64_t next(void) {
    int64_t n;
    if (fread(&n, sizeof n, 1, file) != 1) exit(2);
    return n;
}

int main(int count, char **arguments) {
    char name[4096];
    if (count != 2 || !(file = fopen(arguments[1], "rb"))) return 3;
    int64_t buffers = next(), *sizes = malloc(buffers * sizeof *sizes);
    void **held = malloc(buffers * sizeof *held);
    for (int64_t k = 0; k < buffers; k++) sizes[k] = next();
    for (int64_t k = 0; k < buffers; k++) {
        held[k] = aligned_alloc(64, (sizes[k] / 64 + 2) * 64);
        if (sizes[k] && fread(held[k], sizes[k], 1, file) != 1) return 4;
    }
    for (int64_t calls = next(); calls > 0; calls--) {
        int64_t number = next(), entries = next(), rest[3];
        void *table[64];
        if (entries > 64) return 5;
        for (int64_t k = 0; k < entries; k++) table[k] = held[next()];
        for (int k = 0; k < 3; k++) rest[k] = next();
        functions[number](table, rest[0], rest[1], rest[2]);
    }
    snprintf(name, sizeof name, "%s.out", arguments[1]);
    if (!(file = fopen(name, "wb"))) return 6;
    for (int64_t k = 0; k < buffers; k++)
        if (sizes[k] && fwrite(held[k], sizes[k], 1, file) != 1) return 7;
    return fclose(file) ? 8 : 0;
}
