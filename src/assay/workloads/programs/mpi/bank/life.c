#include <mpi.h>
#include <stdio.h>
#include <string.h>

#define WIDTH 16
#define HEIGHT 16
#define STEPS 8

int main(int argc, char *argv[])
{
    char grid[HEIGHT + 2][WIDTH], next[HEIGHT + 2][WIDTH];
    int rank, size, rows, up, down, alive = 0, total = 0;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    rows = HEIGHT / size;
    up = (rank + size - 1) % size;
    down = (rank + 1) % size;
    for (int i = 1; i <= rows; i++)
        for (int j = 0; j < WIDTH; j++)
            grid[i][j] = ((rank * rows + i) * 7 + j * 3) % 5 < 2;
    for (int step = 0; step < STEPS; step++) {
        MPI_Sendrecv(grid[1], WIDTH, MPI_CHAR, up, 0, grid[rows + 1], WIDTH, MPI_CHAR, down, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        MPI_Sendrecv(grid[rows], WIDTH, MPI_CHAR, down, 1, grid[0], WIDTH, MPI_CHAR, up, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        for (int i = 1; i <= rows; i++)
            for (int j = 0; j < WIDTH; j++) {
                int n = 0;
                for (int di = -1; di <= 1; di++)
                    for (int dj = -1; dj <= 1; dj++)
                        if (di || dj)
                            n += grid[i + di][(j + dj + WIDTH) % WIDTH];
                next[i][j] = n == 3 || (n == 2 && grid[i][j]);
            }
        memcpy(grid[1], next[1], rows * WIDTH);
    }
    for (int i = 1; i <= rows; i++)
        for (int j = 0; j < WIDTH; j++)
            alive += grid[i][j];
    MPI_Reduce(&alive, &total, 1, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0)
        printf("%d alive\n", total);
    MPI_Finalize();
    return 0;
}
