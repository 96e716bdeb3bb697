#include <stdio.h>
#include <stdlib.h>
#include <mpi.h>

#define N 16

int main(int argc, char **argv)
{
    int rank, nprocs;
    double matrix[N][N], vector[N], result[N];
    double *rows, *part;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &nprocs);

    int count = N / nprocs;
    if (rank == 0) {
        for (int i = 0; i < N; i++) {
            vector[i] = i;
            for (int j = 0; j < N; j++)
                matrix[i][j] = i == j ? 2 : 1;
        }
    }
    rows = malloc(count * N * sizeof(double));
    part = malloc(count * sizeof(double));
    MPI_Scatter(matrix, count * N, MPI_DOUBLE, rows, count * N, MPI_DOUBLE, 0, MPI_COMM_WORLD);
    MPI_Bcast(vector, N, MPI_DOUBLE, 0, MPI_COMM_WORLD);
    for (int i = 0; i < count; i++) {
        part[i] = 0;
        for (int j = 0; j < N; j++)
            part[i] += rows[i * N + j] * vector[j];
    }
    MPI_Gather(part, count, MPI_DOUBLE, result, count, MPI_DOUBLE, 0, MPI_COMM_WORLD);
    if (rank == 0)
        for (int i = 0; i < N; i++)
            printf("%d: %.1f\n", i, result[i]);
    free(rows);
    free(part);
    MPI_Finalize();
    return 0;
}
