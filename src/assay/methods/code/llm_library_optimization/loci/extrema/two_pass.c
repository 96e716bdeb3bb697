/* The whole image for the smallest, and the whole image again for the largest. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t smallest = rows[0][0], largest = rows[0][0];
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++)
            smallest = rows[y][x] < smallest ? rows[y][x] : smallest;
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++)
            largest = rows[y][x] > largest ? rows[y][x] : largest;
    *low = smallest;
    *high = largest;
}
