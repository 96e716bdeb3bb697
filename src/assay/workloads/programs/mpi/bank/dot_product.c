#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char *argv[])
{
    const int n = 1200;
    int id, p, i;
    double *a, *b;
    double local = 0, total = 0;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &id);
    MPI_Comm_size(MPI_COMM_WORLD, &p);

    int mine = n / p;
    a = malloc(mine * sizeof(double));
    b = malloc(mine * sizeof(double));
    for (i = 0; i < mine; i++) {
        a[i] = (id * mine + i) % 7;
        b[i] = (id * mine + i) % 5;
    }
    for (i = 0; i < mine; i++)
        local += a[i] * b[i];
    MPI_Allreduce(&local, &total, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    printf("rank %d knows %.1f\n", id, total);
    free(a);
    free(b);
    MPI_Finalize();
    return 0;
}
