from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('experiments', '0007_storage'),
    ]

    operations = [
        migrations.AddField(
            model_name='node',
            name='hangs',
            field=models.BooleanField(default=False),
        ),
        migrations.AddField(
            model_name='node',
            name='exit_code',
            field=models.IntegerField(null=True),
        ),
        migrations.AddField(
            model_name='node',
            name='signal',
            field=models.IntegerField(null=True),
        ),
        migrations.AddField(
            model_name='node',
            name='log_tail',
            field=models.TextField(blank=True, default=''),
        ),
    ]
