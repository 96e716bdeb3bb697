/* Mark which of the 256 values occur, then look from both ends: the work does not depend on the image. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t seen[256] = {0};
    for (int y = 0; y < height; y++) {
        const uint8_t *row = rows[y];
        for (int x = 0; x < width; x++)
            seen[row[x]] = 1;
    }
    int smallest = 0, largest = 255;
    while (!seen[smallest])
        smallest++;
    while (!seen[largest])
        largest--;
    *low = (uint8_t)smallest;
    *high = (uint8_t)largest;
}
