#include <stdio.h>
#include <mpi.h>

#define N 8

int main(int argc, char **argv)
{
    int a[N][N], b[N][N], c[N][N], rows[N][N], out[N][N];
    int rank, size, i, j, k;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    int share = N / size;
    if (rank == 0) {
        for (i = 0; i < N; i++)
            for (j = 0; j < N; j++) {
                a[i][j] = i + j;
                b[i][j] = i - j;
            }
    }
    MPI_Scatter(a, share * N, MPI_INT, rows, share * N, MPI_INT, 0, MPI_COMM_WORLD);
    MPI_Bcast(b, N * N, MPI_INT, 0, MPI_COMM_WORLD);
    for (i = 0; i < share; i++)
        for (j = 0; j < N; j++) {
            out[i][j] = 0;
            for (k = 0; k < N; k++)
                out[i][j] += rows[i][k] * b[k][j];
        }
    MPI_Gather(out, share * N, MPI_INT, c, share * N, MPI_INT, 0, MPI_COMM_WORLD);
    if (rank == 0)
        for (i = 0; i < N; i++)
            printf("row %d: %d %d\n", i, c[i][0], c[i][N - 1]);
    MPI_Finalize();
    return 0;
}
