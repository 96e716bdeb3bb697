/* A program of a candidate: reads how often to call and on how many images, and the images; prints both extrema of each. Every row is
   a block of memory of its own, as long as the row, so that a sanitizer sees who reads beyond it. */
#include <stdio.h>
#include <stdlib.h>

static void take(void *to, size_t bytes)
{
    if (fread(to, 1, bytes, stdin) != bytes)
        exit(2);
}

int main(void)
{
    void (*volatile call)(const uint8_t *const *, int, int, uint8_t *, uint8_t *) = extrema;
    int64_t calls, images;
    take(&calls, sizeof calls);
    take(&images, sizeof images);
    for (int64_t image = 0; image < images; image++) {
        int32_t size[2];
        take(size, sizeof size);
        uint8_t **rows = malloc((size_t)size[1] * sizeof *rows), low = 0, high = 0;
        for (int y = 0; y < size[1]; y++) {
            rows[y] = malloc((size_t)size[0]);
            take(rows[y], (size_t)size[0]);
        }
        for (int64_t i = 0; i < calls; i++)
            call((const uint8_t *const *)rows, size[0], size[1], &low, &high);
        printf("%d %d\n", low, high);
        for (int y = 0; y < size[1]; y++)
            free(rows[y]);
        free(rows);
    }
    return 0;
}
